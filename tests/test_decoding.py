"""The step of one token in place of transformers' own: the same text, whatever `generate` is asked."""

import copy
import inspect
from collections.abc import Callable
from weakref import ref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, DynamicCache, LlamaForCausalLM, StaticCache, TextIteratorStreamer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import rana_kernels as rana
from rana_kernels.backends import installed
from rana_kernels.cli.options import quicken_or_say
from rana_kernels.integrations.decoding import blocks, quicken, step
from rana_kernels.integrations.decoding.cache import SPARE, GrowingLayer
from rana_kernels.integrations.decoding.recipe import INSTRUCTIONS, Kept, NoRecipe, Recipe, recipes
from tests.test_compress import make_model, tokens

pytestmark = pytest.mark.skipif(not installed("cpu"), reason="the CPU library was not built")
GREEDY = {"do_sample": False, "eos_token_id": None}
PROMPT = torch.arange(3, 12)[None]
# the argument's name since transformers 5.24, and before
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


@pytest.fixture(autouse=True)
def steps(monkeypatch) -> list[int]:
    """How many texts each step had that was ours."""
    seen: list[int] = []

    def counted(model, input_ids, *others) -> Tensor:
        seen.append(len(input_ids))
        return blocks.decode(model, input_ids, *others)

    monkeypatch.setattr(step, "decode", counted)
    return seen


def wide_model(architecture: str = "Llama", **sizes) -> nn.Module:
    """Return a model whose logits lie far apart, so that rounding does not change the likeliest token."""
    model = make_model(architecture, **sizes)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.2)
        elif "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def quickened(model: nn.Module) -> nn.Module:
    made = copy.deepcopy(model)
    quicken(made)
    return made


def both(model: nn.Module, prompt: Tensor = PROMPT, **asked) -> tuple[Tensor, Tensor]:
    """Return what `generate` writes with transformers' own step and with ours."""
    asked = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 12, **GREEDY, **asked}
    found = []
    for each in (model, quickened(model)):
        torch.manual_seed(0)
        found.append(each.generate(prompt, **asked))
    return found[0], found[1]


@pytest.mark.parametrize("architecture", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_the_same_text(architecture, steps):
    """Several texts of different lengths; more tokens than there is room for at first."""
    prompt = torch.cat([tokens(3, 9), torch.zeros(1, 9, dtype=torch.long)])
    mask = torch.ones_like(prompt)
    mask[1, :4] = 0
    mask[3, :8] = 0
    sizes = {"sliding_window": None} if architecture == "Mistral" else {}
    model = wide_model(architecture, head_dim=20, **sizes)
    old, new = both(model, prompt, attention_mask=mask, max_new_tokens=SPARE + 40)
    assert torch.equal(old, new) and steps == [4] * (SPARE + 39)


@pytest.mark.parametrize("method", ["global", "paper"])
@pytest.mark.parametrize("bits", [16, 4])
def test_compressed_models_write_the_same(method, bits, steps):
    model = wide_model()
    rana.compress(
        model, [tokens(8)], flops_reduction=0.3, method=method, bits=bits, group=32, progress=False
    )  # fmt: skip
    old, new = both(model, max_new_tokens=40)
    assert torch.equal(old, new) and len(steps) == 39
    assert Recipe(model).holds()


@pytest.mark.parametrize(
    "asked",
    [{"do_sample": True, "temperature": 0.8}, {"do_sample": True, "top_k": 5, "num_return_sequences": 3},
     {"num_beams": 3}, {"repetition_penalty": 1.3}, {"min_new_tokens": 4, "eos_token_id": 5}],
    ids=["sampling", "three texts", "beams", "penalty", "end of text"],
)  # fmt: skip
def test_whatever_is_asked(asked, steps):
    old, new = both(wide_model(), **asked)
    assert torch.equal(old, new) and steps


def test_a_draft_is_checked(steps):
    """The draft decodes by our step, and several tokens at once are checked as before."""
    model = wide_model()
    wanted = model.generate(PROMPT, max_new_tokens=20, **GREEDY)
    quick, draft = quickened(model), quickened(model)
    draft.generation_config.assistant_confidence_threshold = 0.0  # it drafts more than one token
    drafted = quick.generate(PROMPT, max_new_tokens=20, assistant_model=draft, **GREEDY)
    assert torch.equal(drafted, wanted) and steps


def test_streams_and_stop_strings(steps):
    model = wide_model(vocab_size=1024)
    tokenizer = AutoTokenizer.from_pretrained("examples/demo_model")
    written = model.generate(PROMPT, max_new_tokens=12, **GREEDY)[0, 9:-3]
    text = next(filter(str.isalpha, map(tokenizer.decode, written.tolist())))
    streamer = TextIteratorStreamer(tokenizer)
    stopping = {"stop_strings": [text], "tokenizer": tokenizer}
    old = model.generate(PROMPT, max_new_tokens=12, **stopping, **GREEDY)
    new = quickened(model).generate(PROMPT, max_new_tokens=12, streamer=streamer, **stopping, **GREEDY)
    assert torch.equal(old, new) and new.shape[1] < 9 + 12 and steps
    assert "".join(streamer) == tokenizer.decode(new[0])


@torch.no_grad()
def test_as_exact_as_transformers():
    """In bfloat16, the error against float32 is not greater than that of transformers' step."""
    model = wide_model(num_hidden_layers=4)
    prompt, last = tokens(4, 30), torch.arange(4)[:, None]
    exact = model(input_ids=torch.cat([prompt, last], 1)).logits[:, -1]

    def error(made: nn.Module) -> float:
        cache = DynamicCache(config=made.config)
        made(prompt, use_cache=True, **{CACHE: cache})
        logits = made(input_ids=last, use_cache=True, **{CACHE: cache}).logits[:, -1]
        return (logits - exact).norm().item()

    assert error(quickened(model)) < 1e-4 * exact.norm()
    small = model.to(torch.bfloat16)
    assert 0 < error(quickened(small)) < 1.1 * error(small)


def between(length: int = 700, threads: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Return an attention's output and cache after one token of two texts."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 1, heads * 24).to(dtype) for heads in (6, 2, 2))
    cos, sin = (torch.randn(2, 1, 24).to(dtype) for _ in range(2))
    keys, values = (torch.randn(2, 2, length + 5, 24).to(dtype) for _ in range(2))
    seen = torch.rand(2, length + 1) < 0.7
    seen[:, -1] = True
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    y = torch.ops.rana_decoding.attend(q, k, v, cos, sin, seen, keys, values, length, 0.3)
    torch.set_num_threads(before)
    return y, keys, values


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [1, 2, 37])
@pytest.mark.parametrize("queries", [1, 3, 5])
@pytest.mark.parametrize("D", [8, 24, 64, 96])
def test_attention(D, queries, length, masked):
    """Heads of whole vectors and others, in float64 by torch."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3 * n, 1, D) for n in (queries, 1, 1))
    cos, sin = torch.randn(2, 1, D), torch.randn(2, 1, D)
    keys, values = torch.randn(2, 2, 3, length + 1, D)
    seen = torch.rand(2, length + 1) < 0.7 if masked else None
    if seen is not None:
        seen[:, -1] = True
    y = torch.ops.rana_decoding.attend(
        *(t.reshape(2, 1, -1) for t in (q, k, v)), cos, sin, seen, keys, values, length, 0.3
    )
    q, own = apply_rotary_pos_emb(q.double(), k.double(), cos.double(), sin.double())
    torch.testing.assert_close(keys[:, :, length:], own.float())
    assert torch.equal(values[:, :, length:], v)
    mask = None if seen is None else seen[:, None, None]
    wanted = F.scaled_dot_product_attention(
        q, keys.double(), values.double(), mask, scale=0.3, enable_gqa=True
    )  # fmt: skip
    torch.testing.assert_close(y, wanted.reshape(2, 1, -1).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_threads_do_not_change_a_bit(dtype):
    for one, two in zip(between(dtype=dtype), between(dtype=dtype, threads=2), strict=True):
        assert torch.equal(one, two) and one.isfinite().all()


def logits_of(model: nn.Module, recipe: Recipe | None) -> Tensor:
    """Return the logits of four steps of three texts by a recipe, or by the modules."""
    cache = DynamicCache(config=model.config)
    model(tokens(3, 9), use_cache=True, **{CACHE: cache})
    recipes[model] = recipe
    steps = [
        model(input_ids=torch.full((3, 1), t), use_cache=True, **{CACHE: cache}).logits for t in range(4)
    ]
    return torch.stack(steps)


def compressed(architecture: str = "Llama", method: str = "global", bits: int = 4) -> nn.Module:
    sizes = {"sliding_window": None} if architecture == "Mistral" else {}
    model = wide_model(architecture, **sizes).to(torch.bfloat16)
    rana.compress(
        model, [tokens(8)], flops_reduction=0.3, method=method, bits=bits, group=32, progress=False
    )  # fmt: skip
    quicken(model)
    return model


@torch.no_grad()
@pytest.mark.parametrize("method", ["global", "paper"])
@pytest.mark.parametrize("architecture", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_a_recipe_gives_the_bits_of_the_modules(architecture, method):
    """paper has ranks that q, k and v share. In float32, the activation of a dense MLP differs by an ulp."""
    model = compressed(architecture, method, bits=16 if architecture == "Mistral" else 4)
    assert torch.equal(logits_of(model, Recipe(model)), logits_of(model, None))


def hook(model: nn.Module, called: list) -> None:
    model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda *_: called.append(1))


def hook_all(model: nn.Module, called: list) -> None:
    nn.modules.module.register_module_forward_hook(lambda *_: called.append(1))


def replace_forward(model: nn.Module, called: list) -> None:
    old = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: (called.append(1), old(x))[1]


def replace_module(model: nn.Module, called: list) -> None:
    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            called.append(1)
            return x

    model.model.layers[0].self_attn.o_proj = Other()


@torch.no_grad()
@pytest.mark.parametrize("change", [hook, hook_all, replace_forward, replace_module])
def test_a_recipe_notices_what_changes(change, request):
    request.addfinalizer(nn.modules.module._global_forward_hooks.clear)
    model, called = compressed(), []
    recipe = Recipe(model)
    before = logits_of(model, recipe)
    assert recipe.holds()
    change(model, called)
    after = logits_of(model, recipe)
    assert len(called) >= 4 and not recipe.holds()
    assert torch.equal(after, before) is (change is not replace_module)
    model(tokens(1, 2))
    assert model not in recipes, "it is made anew after a prompt"


@torch.no_grad()
def test_a_recipe_reads_the_weights_of_the_moment():
    model = compressed(bits=16)
    recipe, linear = Recipe(model), model.model.layers[0].self_attn.o_proj
    before = logits_of(model, recipe)
    linear.rows = nn.Parameter(linear.rows.neg(), requires_grad=False)
    after = logits_of(model, recipe)
    assert recipe.holds() and not torch.equal(after, before)
    assert torch.equal(after, logits_of(model, None))
    linear.threshold.fill_(1e9)
    assert torch.equal(logits_of(model, recipe), logits_of(model, None))


@torch.no_grad()
def test_tensors_that_a_model_gives_up_are_not_kept():
    model = compressed(bits=16)
    recipe, linear = Recipe(model), model.model.layers[0].self_attn.o_proj
    logits_of(model, recipe)
    kept, replaced = recipe.kept, ref(linear.rows)
    logits_of(model, recipe)
    assert recipe.kept is kept, "nothing has changed"
    linear.rows = nn.Parameter(linear.rows.neg(), requires_grad=False)
    logits_of(model, recipe)
    number = kept.number
    del kept
    assert recipe.kept.number != number and replaced() is None
    with pytest.raises(RuntimeError, match="wanted a recipe that is kept"):
        angles, cache = [torch.zeros(1, 1, 8)] * 2, [[torch.zeros(1, 1, 4, 8)]] * 2
        torch.ops.rana_decoding.run_blocks(
            torch.ones(1, 1, 8), number, 1e-5, *angles, None, *cache, 2, 1.0, "silu"
        )


def test_still_held_compares_as_python_does():
    from rana_kernels import _held

    one, two = object(), object()
    dictionaries = ({"a": one}, {"b": None}, {}, nn.Linear(2, 2)._parameters)
    keys, weight = ("a", "b", "c", "weight"), dictionaries[3]["weight"]
    assert _held.still_held(dictionaries, keys, (one, None, None, weight))
    assert _held.still_held((), (), ())
    for i in range(4):
        values = [one, None, None, weight]
        values[i] = two
        assert not _held.still_held(dictionaries, keys, tuple(values))
    with pytest.raises(ValueError, match="tuples of one length"):
        _held.still_held(dictionaries, keys, (one,))
    with pytest.raises(TypeError, match="wanted dictionaries"):
        _held.still_held(([],), ("a",), (None,))
    with pytest.raises(TypeError, match="unhashable"):
        _held.still_held(({},), ([],), (None,))


@torch.no_grad()
def test_autocast_and_linears_of_torch_are_computed_by_modules():
    model = compressed()
    recipe = Recipe(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert not recipe.holds()
    with pytest.raises(NoRecipe):
        Recipe(wide_model())  # whose linears are torch's


def test_no_recipe_overruns_its_weights():
    """Recipes at random are computed or refused."""
    torch.manual_seed(0)
    refused = 0
    for _ in range(2000):
        recipe = torch.randint(-1, len(INSTRUCTIONS) + 1, (int(torch.randint(1, 6, ())),)).tolist()
        weights = [
            None if torch.rand(()) < 0.3 else torch.ones([8] * int(torch.randint(1, 3, ())))
            for _ in range(int(torch.randint(0, 12, ())))
        ]
        caches = [[torch.zeros(2, 1, 4, 8)] for _ in range(2)]
        angles = [torch.zeros(2, 1, 8)] * 2
        kept = Kept(recipe, tuple(weights))
        given = (torch.ones(2, 1, 8), kept.number, 1e-5, *angles, None, *caches, 2, 1.0, "silu")
        try:
            assert torch.ops.rana_decoding.run_blocks(*given).shape[:2] == (2, 1)
        except RuntimeError:
            refused += 1
    assert 1000 < refused < 2000


@pytest.mark.parametrize("sizes", [(2, 0, 4, 8), (2, 1, 4, 0), (2, 8), (1, 1, 4, 8)], ids=str)
@pytest.mark.parametrize("instruction", ["norm_heads", "attend"])
def test_a_cache_of_another_shape_is_refused(instruction, sizes):
    weight, angles, cache = torch.ones(8), [torch.zeros(2, 1, 8)] * 2, torch.zeros(sizes)
    recipe = [INSTRUCTIONS.index(name) for name in ("linear", instruction)]
    kept = Kept(recipe, (torch.ones(24, 8), None, None, weight, weight))
    x = torch.ones(2, 1, 8)
    with pytest.raises(RuntimeError):
        torch.ops.rana_decoding.run_blocks(
            x, kept.number, 1e-5, *angles, None, [cache], [cache], 2, 1.0, "silu"
        )


@pytest.mark.parametrize("changed", ["keys", "values", "k", "cos", "seen", "length"])
def test_nothing_is_overrun(changed):
    given = {
        "q": torch.zeros(2, 1, 96), "k": torch.zeros(2, 1, 48), "v": torch.zeros(2, 1, 48),
        "cos": torch.zeros(2, 1, 24), "sin": torch.zeros(2, 1, 24),
        "seen": torch.ones(2, 6, dtype=torch.bool), "keys": torch.zeros(2, 2, 9, 24),
        "values": torch.zeros(2, 2, 9, 24), "length": 5, "scale": 1.0,
    }  # fmt: skip
    torch.ops.rana_decoding.attend(**given)
    given[changed] = 9 if changed == "length" else given[changed][..., :-1].contiguous()
    with pytest.raises(RuntimeError, match="rana_decoding: wanted"):
        torch.ops.rana_decoding.attend(**given)


def test_heads_of_an_odd_size_are_refused():
    token, cache, angles = torch.zeros(1, 1, 7), torch.zeros(1, 1, 3, 7), torch.zeros(1, 1, 7)
    with pytest.raises(RuntimeError, match="heads of an even size"):
        torch.ops.rana_decoding.attend(*[token] * 3, angles, angles, None, cache, cache.clone(), 1, 1.0)


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [lambda m, g: g.update({CACHE: StaticCache(config=m.config, max_cache_len=20)}),
     lambda m, g: g.update(use_cache=False), lambda m, g: g.update(output_hidden_states=True),
     lambda m, g: g.update(input_ids=tokens(1, 2)), lambda m, g: m.train()],
    ids=["static cache", "no cache", "hidden states", "two tokens", "training"],
)  # fmt: skip
def test_everything_else_is_left_to_transformers(change: Callable, steps):
    model = quickened(wide_model())
    cache = DynamicCache(config=model.config)
    model(PROMPT, use_cache=True, **{CACHE: cache})
    given = {"input_ids": tokens(1, 1), CACHE: cache, "use_cache": True}
    assert model(**given).logits.shape[1] == 1 and len(steps) == 1
    change(model, given)
    assert model(**given).logits.isfinite().all() and len(steps) == 1


@torch.no_grad()
def test_a_cache_is_given_back_and_goes_on(steps):
    """Keys are written in place. A copied or cropped cache does not see what another one writes."""
    model = wide_model()
    quick = quickened(model)
    cache = quick.generate(PROMPT, max_new_tokens=5, return_dict_in_generate=True, **GREEDY).past_key_values
    assert all(type(layer) is GrowingLayer for layer in cache.layers)
    other = copy.deepcopy(cache)
    cropped = copy.copy(cache.layers[0])
    cropped.crop(-2)
    held = cropped.keys.clone()
    for _ in range(3):
        quick(input_ids=tokens(1, 1), use_cache=True, **{CACHE: cache})
    cropped.update(*(torch.ones(1, 2, 1, 16) for _ in range(2)))
    assert cache.get_seq_length() == other.get_seq_length() + 3 == 9 + 4 + 3
    assert torch.equal(cache.layers[0].keys[:, :, :13], other.layers[0].keys)
    assert torch.equal(cropped.keys[:, :, :11], held) and not cropped.keys[:, :, 11:].ne(1).any()


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_cache_is_written_in_other_modes(mode, steps):
    """A cache that was made in inference mode goes on outside of it, and the other way round."""
    model = quickened(wide_model())
    cache = DynamicCache(config=model.config)
    given = {CACHE: cache, "use_cache": True}
    with mode():
        model(PROMPT, **given)
        model(input_ids=tokens(1, 1), **given)
    with torch.no_grad() if mode is torch.inference_mode else torch.inference_mode():
        for length in (1, 2, 1):
            logits = model(input_ids=tokens(1, length), **given).logits
    assert cache.get_seq_length() == 9 + 5 and logits.isfinite().all() and len(steps) == 3


def test_models_without_a_step_say_so(capsys, steps):
    model = wide_model("GPT2")
    wanted = model.generate(PROMPT, max_new_tokens=5, **GREEDY)
    with pytest.raises(ValueError, match="of the type gpt2, wanted a causal model of llama, mistral"):
        quicken(model)
    quicken_or_say(model)
    said = capsys.readouterr().err
    assert said.startswith("rana: tokens are decoded by transformers' own step: GPT2LMHeadModel is")
    assert said.count("\n") == 1
    assert torch.equal(model.generate(PROMPT, max_new_tokens=5, **GREEDY), wanted) and not steps


@pytest.mark.parametrize(
    ("make", "message"),
    [(lambda: make_model("Mistral", sliding_window=8), "wanted every layer to see the whole text"),
     (lambda: make_model().model, "LlamaModel is of the type llama"),
     (lambda: make_model().to("meta"), "parameters on meta, wanted all on the CPU")],
    ids=["sliding window", "no lm_head", "another device"],
)  # fmt: skip
def test_what_has_no_step(make, message):
    with pytest.raises(ValueError, match=message):
        quicken(make())


def test_a_copy_computes_with_its_own_weights(steps):
    model = quickened(wide_model())
    other = copy.deepcopy(model)
    model.lm_head.weight.data.neg_()
    written = [each.generate(PROMPT, max_new_tokens=5, **GREEDY) for each in (model, other)]
    assert not torch.equal(*written) and len(steps) == 8


def test_it_can_be_undone(steps):
    model = wide_model()
    quicken(model)
    quicken(model)
    step.unquicken(model)
    model.generate(PROMPT, max_new_tokens=3, **GREEDY)
    assert "forward" not in vars(model) and not steps
