"""The words of the report: what each table and plot shows, and how to read it."""

from examples.demo.results import Results


def summary(results: Results) -> str:
    quality = results.quality
    return (
        "RaNA (arXiv 2503.18216) rewrites a linear layer as two thin products and skips, token by token, "
        f"the ranks that barely matter. Here it compresses a Llama model of {quality.parameters / 1e6:.1f} "
        f"million parameters, calibrated on {quality.calibration_tokens:,} tokens and not trained further."
    )


def quality(results: Results) -> str:
    return (
        f"Perplexity on {results.quality.evaluation_tokens:,} tokens of held-out text, at several costs: "
        "with one budget for the whole model, spent where the loss gains most; as published, with the same "
        "share for every layer; and by plain low rank. "
        f"{COST} Live ranks and neurons are means over the adapters."
    )


def bits(results: Results) -> str:
    return (
        f"The model with {results.texts.flops_reduction:.0%} fewer FLOPs in 16 bits, and compressed again "
        "with bits=4 (groups of 32, lm_head too). Megabytes are of the linears and lm_head, not of the "
        "embedding; read ones are those of one token, with the live rows of the calibration. The models take "
        "turns to write one text on all threads. A model so small spends most of a token outside of these "
        "linears."
    )


def texts(results: Results) -> str:
    return (
        "Every model continues the same prompt with the likeliest token at every step. The compressed models "
        f"have {results.texts.flops_reduction:.0%} fewer FLOPs. RaNA's model was first written to disk "
        f"({results.texts.stored_megabytes:.1f} MB with its tokenizer) and read back."
    )


def decode(_: Results) -> str:
    return (
        "One decode step of the linears of one block: bfloat16, one token, random weights. Medians of runs "
        "that take turns, with weights rotated over copies larger than the last cache. o is dense in both. "
        "GB/s is the weights that must be read ÷ time. A speed-up above 1 ÷ cost is bandwidth that PyTorch's "
        "dense product leaves unused."
    )


def perplexity(_: Results) -> str:
    return (
        "Perplexity against cost: lower and further left is better. Static low rank is the same "
        f"decomposition with fewer ranks, all of them always on. {COST}"
    )


def live_ranks(results: Results) -> str:
    return (
        "Stored rows of each layer, and live rows of a token, on average on evaluation text, for RaNA as "
        f"published at {results.texts.flops_reduction:.0%} fewer FLOPs. Rows are ranks, or for down "
        "neurons."
    )


def spectra(_: Results) -> str:
    return (
        "Energy of the ranks of each layer on calibration text, largest first, as shares of their sum; for "
        "down, of its neurons. The steeper the fall, the fewer ranks matter."
    )


def output_error(_: Results) -> str:
    return (
        "Relative error of each linear's output on calibration text, mean over layers, against the cost of "
        "the model, for the methods that treat layers alike. Within an MLP, RaNA spends its budget where the "
        "MLP's output gains most."
    )


def density(results: Results) -> str:
    sweep = results.density[0]
    return (
        f"Time of one masked low-rank linear {sweep.in_features} → {sweep.out_features} with {sweep.rank} "
        "stored ranks against the share of them that is live: bfloat16, one token, random weights; the "
        "band is the 20th to the 80th percentile. RaNA can be faster than the ideal, because at one token "
        "PyTorch's dense product does not read memory as fast as it could."
    )


COST = (
    "Cost is the multiply-adds of all linears of the blocks as a fraction of the dense ones, with the live "
    "rows on evaluation text; o stays dense."
)
