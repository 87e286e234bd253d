"""`rana generate`."""

import time
from typing import Annotated

import typer

from rana_kernels.checkpoint.draft import make_draft
from rana_kernels.cli.lengths import count_new
from rana_kernels.cli.options import (
    AsJson,
    Budget,
    Checkpoint,
    app,
    open_compressed,
    open_tokenizer,
    print_json,
    quicken_or_say,
)


@app.command(
    epilog="""\b
Example:
  rana generate llama-rana --prompt "Once upon a time" --max-new-tokens 50"""
)
def generate(
    directory: Checkpoint,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Stop after this many new tokens.",
            show_default="100, or what the model takes after the prompt",
        ),
    ] = None,
    temperature: Annotated[
        float,
        typer.Option(
            min=0.0, help="Sample at this temperature. With 0, the likeliest token is always taken."
        ),
    ] = 0.0,
    budget: Budget = None,
    draft_budget: Annotated[
        float | None,
        typer.Option(
            metavar="RATIO",
            help="Let the same weights with the masks of this budget propose tokens. The text is the same.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt with a compressed model."""
    model = open_compressed(directory, budget)
    tokenizer = open_tokenizer(directory)
    if tokenizer is None:
        raise ValueError(
            f"{directory} holds no tokenizer: give it to rana.save, or compress with it in place"
        )
    asked = tokenizer(prompt, return_tensors="pt").to(model.device)
    if asked["input_ids"].shape[1] == 0:
        raise ValueError("the prompt is empty, wanted at least one token")
    new_tokens = count_new(model, asked["input_ids"].shape[1], max_new_tokens)
    quicken_or_say(model)
    draft = None if draft_budget is None else make_draft(model, draft_budget)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    started = time.perf_counter()
    written = model.generate(
        input_ids=asked["input_ids"],
        attention_mask=asked["attention_mask"],
        max_new_tokens=new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        assistant_model=draft,
        **sampling,
    )[0, asked["input_ids"].shape[1] :]
    seconds = time.perf_counter() - started
    continuation = tokenizer.decode(written, skip_special_tokens=True)
    if as_json:
        facts = {"tokens": len(written), "tokens_per_second": len(written) / seconds}
        print_json({"prompt": prompt, "text": continuation, **facts})
    else:
        print(prompt + continuation)
