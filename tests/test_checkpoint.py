"""On disk and back: the same bits, or an error that says what is wrong. Never anything between."""

import copy
import json
import resource
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

import rana_kernels as rana
from rana_kernels.checkpoint.attachment import attach_plan, attached_plan
from rana_kernels.checkpoint.headers import CheckpointError, read_header
from rana_kernels.checkpoint.manifest import CARD, MANIFEST, read_manifest, write_manifest
from rana_kernels.checkpoint.model_card import note, write_card
from tests.subprocesses import python
from tests.test_compress import assert_equal_states, hand_plan, logits, make_model, tokens

WEIGHTS = "model.safetensors"
THRESHOLD = "model.layers.0.mlp.threshold"


def compressed(architecture: str = "Llama", dtype: torch.dtype = torch.float32, **sizes) -> nn.Module:
    model = make_model(architecture, **sizes)
    # not .to(dtype): it also rounds the rotary frequencies, which no loader does
    model = type(model)._from_config(model.config, dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    rana.compress(model, [tokens()], flops_reduction=0.3, method="paper", progress=False)
    return model


def written(model: nn.Module) -> list[int]:
    return model.generate(tokens(1, 8), max_new_tokens=8, do_sample=False)[0].tolist()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return compressed(num_hidden_layers=1)


@pytest.fixture(scope="module")
def original(model, tmp_path_factory) -> Path:
    """A checkpoint to be copied, not changed."""
    place = tmp_path_factory.mktemp("original") / "checkpoint"
    rana.save(model, place)
    return place


@pytest.fixture
def checkpoint(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "checkpoint"))


# the same bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("architecture", "tied"), [("Llama", True), ("Qwen2", False)])
def test_a_round_trip_keeps_every_bit_twice(architecture, tied, dtype, tmp_path):
    first = compressed(architecture, dtype, tie_word_embeddings=tied)
    rana.save(first, tmp_path / "once")
    second = rana.load(tmp_path / "once")
    rana.save(second, tmp_path / "twice")
    third = rana.load(tmp_path / "twice")
    for model in (second, third):
        assert_equal_states(first, model)
        assert torch.equal(logits(first), logits(model)) and written(first) == written(model)
        assert attached_plan(model) == attached_plan(first) and not model.training
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    same = [(tmp_path / d / WEIGHTS).read_bytes() for d in ("once", "twice")]
    assert same[0] == same[1]


@pytest.mark.parametrize("joint", [False, True], ids=["separate", "joint"])
@pytest.mark.parametrize("first", ["rank", "neuron"])
@pytest.mark.parametrize("kind", ["rank", "neuron", "dense"])
def test_every_kind_of_adapter_comes_back(kind, first, joint, tmp_path):
    model = make_model("Qwen2")
    made = hand_plan(model, joint, o=kind, down=kind, first=first)
    rana.compress(model, [tokens()], plan=made, progress=False)
    rana.save(model, tmp_path / "out")
    assert torch.equal(logits(model), logits(rana.load(tmp_path / "out")))


def test_transformers_reads_and_writes_it_alone(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_equal_states(model, again)
    assert again.hf_quantizer.is_serializable() and again.hf_quantizer.is_compileable
    assert_equal_states(model, rana.load(tmp_path))
    (tmp_path / MANIFEST).unlink()
    assert_equal_states(model, AutoModelForCausalLM.from_pretrained(tmp_path))
    with pytest.raises(CheckpointError, match="has no rana.json.*from_pretrained loads"):
        rana.load(tmp_path)


def test_the_card_goes_with_the_model_and_names_the_hub(model, tmp_path):
    note(model, base_model="org/tiny-model", calibration={"data": "some | text"})
    rana.save(model, tmp_path / "once")
    rana.save(rana.load(tmp_path / "once"), tmp_path / "twice")
    cards = [(tmp_path / place / "README.md").read_text() for place in ("once", "twice")]
    assert cards[0] == cards[1] and "240 tokens, of some / text, seed 0" in cards[0]
    data = ModelCard(cards[0]).data
    assert (data.base_model, data.pipeline_tag) == ("org/tiny-model", "text-generation")
    assert "rana_kernels" in data.tags and "# tiny-model, compressed" in cards[0]


@pytest.mark.parametrize("made", [None, [], {"calibration": 3, "perplexity": {"dense": "x"}, "bytes": None}])
def test_facts_that_are_none_are_left_out_of_the_card(made, model):
    broken = copy.copy(model)
    broken.config = copy.deepcopy(model.config)
    attach_plan(broken, attached_plan(model), made)
    assert "| perplexity | not measured |" in write_card(broken)


def test_shards_come_back(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_equal_states(model, rana.load(tmp_path))


def test_another_dtype_leaves_thresholds_alone(original):
    model = rana.load(original, dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        wanted = torch.float32 if name.endswith(("threshold", "norms")) else torch.bfloat16
        assert tensor.dtype == wanted, name
    assert logits(model).isfinite().all()


def test_the_manifest_says_what_it_is(model, original):
    manifest = read_manifest(original)
    on_disk = {path.name for path in original.iterdir()}
    assert set(manifest.files) == on_disk - {MANIFEST, CARD, "generation_config.json"}
    assert manifest.facts["stored_bytes"] == sum((original / n).stat().st_size for n in manifest.files)
    assert manifest.facts["compression"]["block_flops_reduction"] == attached_plan(model).reduction
    assert manifest.facts["base"]["model_type"] == "llama"
    assert manifest.facts["versions"]["rana_kernels"] == rana.__version__


# damage


def flips(path: Path, count: int) -> list[tuple[int, int]]:
    """Positions all over a file, its first bytes among them, each with a bit."""
    size = path.stat().st_size
    places = sorted({*range(min(10, size)), *(i * size // count for i in range(count)), size - 1})
    return [(place, 1 << (place % 8)) for place in places]


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_every_flipped_bit_is_found(name, checkpoint):
    path = checkpoint / name
    whole = path.read_bytes()
    for place, bit in flips(path, 150):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match=f"{name} is damaged, or was changed .* its SHA-256"):
            rana.load(checkpoint)


def test_a_flipped_bit_of_the_manifest_is_found_or_harmless(model, checkpoint):
    path = checkpoint / MANIFEST
    whole, found = path.read_bytes(), 0
    for place, bit in flips(path, 100):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        try:
            assert_equal_states(model, rana.load(checkpoint))
        except CheckpointError:
            found += 1
    assert found > 50


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, MANIFEST])
def test_every_truncation_is_found(name, checkpoint):
    path = checkpoint / name
    whole = path.read_bytes()
    for length in {*range(12), *(i * len(whole) // 80 for i in range(80)), len(whole) - 2}:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            rana.load(checkpoint)
    path.unlink()
    with pytest.raises(CheckpointError, match="is missing|has no rana.json"):
        rana.load(checkpoint)


def test_transformers_alone_finds_damage_too(checkpoint):
    path = checkpoint / WEIGHTS
    whole = path.read_bytes()
    path.write_bytes(whole[:-7] + bytes([whole[-7] ^ 1]) + whole[-6:])
    with pytest.raises(CheckpointError, match="is damaged"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_there_must_be_a_directory(tmp_path):
    with pytest.raises(CheckpointError, match="there is no such directory"):
        rana.load(tmp_path / "nothing")


# what its owner may change


def test_files_of_the_owner_are_not_vouched_for(model, checkpoint):
    """Also if the manifest of an older version lists them."""
    entry = {"bytes": 1, "sha256": "0" * 64}
    edit_manifest(checkpoint, lambda data: data["files"].update({"generation_config.json": entry}))
    changed = GenerationConfig.from_pretrained(checkpoint)
    changed.max_new_tokens = 7
    changed.save_pretrained(checkpoint)
    (checkpoint / "chat_template.jinja").write_text("{{ messages }}")
    (checkpoint / "tokenizer_config.json").write_text("{}")
    loaded = rana.load(checkpoint)
    assert loaded.generation_config.max_new_tokens == 7
    assert_equal_states(model, loaded)


def test_weights_that_were_changed_on_purpose_can_be_kept(model, checkpoint):
    """The message says how, for another size and for another content."""
    path = checkpoint / WEIGHTS
    header, data = split(path)
    header["__metadata__"] = {"format": "pt", "note": "another size"}
    for weights in (path.read_bytes()[:-1] + b"\x3c", join(header, data)):
        path.write_bytes(weights)
        with pytest.raises(
            CheckpointError, match=r"If the change was meant: delete rana\.json, read .*save_pretrained"
        ):
            rana.load(checkpoint)
    (checkpoint / MANIFEST).unlink()
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(checkpoint)
    assert_equal_states(model, rana.load(checkpoint))


SHARDED, WHOLE = {"max_shard_size": "40KB"}, {}
SAVES = [(WHOLE, SHARDED), (SHARDED, WHOLE), (SHARDED, {"max_shard_size": "60KB"}), (WHOLE, WHOLE)]


@pytest.mark.parametrize(("before", "after"), SAVES, ids=str)
def test_a_model_that_was_trained_is_saved_over_the_old_one(before, after, model, tmp_path):
    model.save_pretrained(tmp_path, **before)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"of its owner")
    tuned = rana.load(tmp_path)
    with torch.no_grad():
        tuned.model.norm.weight += 1
    tuned.save_pretrained(tmp_path, **after)
    for loaded in (rana.load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert_equal_states(tuned, loaded)
    weights = {path.name for path in tmp_path.glob("model*")}
    assert weights == {name for name in read_manifest(tmp_path).files if name != "config.json"}
    assert ((tmp_path / WEIGHTS) in tmp_path.iterdir()) == (after is WHOLE)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == b"of its owner"


def test_a_variant_leaves_the_other_weights(model, tmp_path):
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, variant="small", max_shard_size="40KB")
    model.save_pretrained(tmp_path, variant="small")
    assert {path.name for path in tmp_path.glob("model*")} == {WEIGHTS, "model.small.safetensors"}
    assert_equal_states(model, rana.load(tmp_path))
    assert_equal_states(model, AutoModelForCausalLM.from_pretrained(tmp_path, variant="small"))


@contextmanager
def small_disk(bytes: int):
    """Let files grow to so many bytes. Writing more fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "way", [rana.save, lambda model, place: model.save_pretrained(place)], ids=["rana", ""]
)
def test_a_full_disk_leaves_the_old_one(way, model, checkpoint):
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    with small_disk(50_000), pytest.raises((OSError, SafetensorError), match="[Ff]ile too large"):
        way(model, checkpoint)
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before


# manifests that lie

PATHS = ["../x", "/etc/passwd", "a/../../x", "./config.json", "a\\b", "C:x", "", "a//b"]


def edit_manifest(checkpoint: Path, change: Callable[[dict], object]) -> None:
    data = json.loads((checkpoint / MANIFEST).read_text())
    change(data)
    (checkpoint / MANIFEST).write_text(json.dumps(data))


@pytest.mark.parametrize("name", PATHS)
def test_paths_stay_within_the_directory(name, checkpoint):
    entry = {"bytes": 1, "sha256": "0" * 64}
    edit_manifest(checkpoint, lambda data: data["files"].update({name: entry}))
    with pytest.raises(CheckpointError, match="is not a path within the directory"):
        rana.load(checkpoint)


LIES: dict[str, tuple[Callable[[dict], object], str]] = {
    "newer": (lambda d: d.update(format=4), r"format is '4', this version .* reads 3: install"),
    "true": (lambda d: d.update(format=True), "format is 'True'"),
    "unversioned": (lambda d: d.pop("format"), "format is 'None'"),
    "no files": (lambda d: d.update(files=[]), "wanted an object that lists config.json"),
    "unlisted config": (lambda d: d["files"].pop("config.json"), "lists config.json"),
    "unlisted weights": (lambda d: d["files"].pop(WEIGHTS), "does not list 'model.safetensors'"),
    "no hash": (lambda d: d["files"][WEIGHTS].pop("sha256"), "wanted its bytes and sha256"),
    "short hash": (lambda d: d["files"][WEIGHTS].update(sha256="ab"), "wanted its bytes and sha256"),
    "size": (lambda d: d["files"][WEIGHTS].update(bytes=2**60), "wanted 1152921504606846976 by"),
    "size of text": (lambda d: d["files"][WEIGHTS].update(bytes="9"), "wanted its bytes and sha256"),
    "more files": (
        lambda d: d["files"].update({"model.x.safetensors": d["files"][WEIGHTS]}),
        "model.x.safetensors is missing",
    ),
}


@pytest.mark.parametrize(("change", "message"), LIES.values(), ids=LIES.keys())
def test_manifests_that_lie_are_refused(change, message, checkpoint):
    edit_manifest(checkpoint, change)
    with pytest.raises(CheckpointError, match=message):
        rana.load(checkpoint)


@pytest.mark.parametrize("text", ["[]", "{", "[" * 10**5, '{"format": 3, "format": 3}', "\xff", "null"])
def test_what_is_no_manifest_is_refused(text, checkpoint):
    (checkpoint / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match="rana.json"):
        rana.load(checkpoint)


# weights that lie, under a manifest that agrees with them


def split(path: Path) -> tuple[dict, bytes]:
    """Header and data of a safetensors file."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def join(header: dict | str, data: bytes) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + data


def forge(checkpoint: Path, model: nn.Module, weights: bytes) -> None:
    """What somebody who writes the hashes anew can do."""
    (checkpoint / WEIGHTS).write_bytes(weights)
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint, model, attached_plan(model))


def changed(**fields) -> Callable[[dict, bytes], bytes]:
    def forgery(header: dict, data: bytes) -> bytes:
        header[THRESHOLD] |= fields
        return join(header, data)

    return forgery


def renamed(header: dict, data: bytes) -> bytes:
    header["model.surplus"] = header.pop(THRESHOLD)
    return join(header, data)


def without_the_last(header: dict, data: bytes) -> bytes:
    header.pop("__metadata__", None)
    last = max(header, key=lambda name: header[name]["data_offsets"])
    begin, _ = header.pop(last)["data_offsets"]
    return join(header, data[:begin])


def in_bfloat16(header: dict, data: bytes) -> bytes:
    """The thresholds rounded: half as many bytes, and everything after them moved up."""
    begin, end = header[THRESHOLD]["data_offsets"]
    half = (end - begin) // 2
    for name, entry in header.items():
        if name != "__metadata__" and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [offset - half for offset in entry["data_offsets"]]
    header[THRESHOLD] |= {"dtype": "BF16", "data_offsets": [begin, begin + half]}
    return join(header, data[: begin + half] + data[end:])


def twice(header: dict, data: bytes) -> bytes:
    text = json.dumps(header)
    return join(text[:-1] + f', "{THRESHOLD}": {json.dumps(header[THRESHOLD])}}}', data)


FORGERIES: dict[str, tuple[Callable[[dict, bytes], bytes], str]] = {
    "length": (lambda h, d: (2**63).to_bytes(8, "little") + d, "the header claims 9223372036854775808"),
    "empty": (lambda h, d: b"", "the header claims 0 bytes of a file of 0"),
    "zeros": (lambda h, d: bytes(100), "the header claims 0"),
    "list": (lambda h, d: join("[]", d), "the header is a list"),
    "no JSON": (lambda h, d: join("{]", d), "is not JSON"),
    "deep": (lambda h, d: join('{"a":' * 10**5, d), "is not JSON"),
    "twice": (twice, "is there twice"),
    "huge": (changed(shape=[2**40, 2**40]), r"takes \d+ bytes, data_offsets give"),
    "negative": (changed(shape=[-1, -192]), "wanted lists of whole numbers"),
    "text": (changed(shape="many"), "wanted lists of whole numbers"),
    "dtype": (changed(dtype="F3"), "dtype is 'F3', wanted one of F64, F32"),
    "offsets": (changed(data_offsets=[0, 384]), "overlaps the tensor before it|takes 384 bytes"),
    "offset": (changed(data_offsets=[5]), "two of them for the offsets"),
    "fields": (changed(code="x"), "wanted dtype, shape and data_offsets"),
    "surplus": (renamed, "holds 'model.surplus', which the model of this plan has not"),
    "missing": (without_the_last, "1 tensors are in no file"),
    "shorter": (lambda h, d: join(h, d[:-4]), "truncated or damaged"),
    "longer": (lambda h, d: join(h, d + b"more"), "truncated or damaged"),
    "rounded": (in_bfloat16, r"threshold has dtype BF16, wanted torch.float32"),
}


@pytest.mark.parametrize(("forgery", "message"), FORGERIES.values(), ids=FORGERIES.keys())
def test_forged_weights_are_refused_before_they_are_read(forgery, message, model, checkpoint, monkeypatch):
    forge(checkpoint, model, forgery(*split(checkpoint / WEIGHTS)))
    monkeypatch.setattr(transformers.PreTrainedModel, "_load_pretrained_model", None)
    with pytest.raises(CheckpointError, match=message):
        rana.load(checkpoint)


def test_overlap_and_gap_are_told_apart(checkpoint):
    header, data = split(checkpoint / WEIGHTS)
    begin, end = header[THRESHOLD]["data_offsets"]
    for shift, message in ((-4, "overlaps the tensor before it"), (4, "leaves a gap before it")):
        entry = header[THRESHOLD] | {"data_offsets": [begin + shift, end + shift]}
        (checkpoint / WEIGHTS).write_bytes(join(header | {THRESHOLD: entry}, data))
        with pytest.raises(CheckpointError, match=message):
            read_header(checkpoint / WEIGHTS)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_thresholds_must_be_finite(bad, model, checkpoint):
    header, data = split(checkpoint / WEIGHTS)
    begin, _ = header[THRESHOLD]["data_offsets"]
    value = torch.tensor([bad]).numpy().tobytes()
    forge(checkpoint, model, join(header, data[:begin] + value + data[begin + 4 :]))
    with pytest.raises(ValueError, match=r"mlp: threshold has .*, wanted finite numbers >= 0"):
        rana.load(checkpoint)


def test_a_plan_of_another_shape_is_refused(model, checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    for change, message in [
        ({"rank": 32, "live": 8.0}, "has shape .* by the plan"),
        ({"in_features": 2**30}, "the plan does not fit|rank has"),
        ({"threshold": "low"}, "threshold has 'low'"),
    ]:
        altered = json.loads(json.dumps(config))
        altered["quantization_config"]["plan"]["adapters"][0] |= change
        (checkpoint / "config.json").write_text(json.dumps(altered))
        forge(checkpoint, model, (checkpoint / WEIGHTS).read_bytes())
        with pytest.raises(CheckpointError, match=message):
            rana.load(checkpoint)
    del config["quantization_config"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    forge(checkpoint, model, (checkpoint / WEIGHTS).read_bytes())
    with pytest.raises(CheckpointError, match="has no plan in quantization_config"):
        rana.load(checkpoint)


def test_an_index_cannot_reach_outside(model, tmp_path):
    place = tmp_path / "checkpoint"
    model.save_pretrained(place, max_shard_size="40KB")
    shard = sorted(place.glob("*.safetensors"))[0]
    shard.rename(tmp_path / shard.name)
    index = place / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(shard.name, f"../{shard.name}"))
    write_manifest(place, model, attached_plan(model))
    with pytest.raises(CheckpointError, match="refers to weights outside of it"):
        rana.load(place)


@pytest.mark.parametrize("written", ["rana.save", "save_pretrained", "shards"])
def test_a_checkpoint_in_a_subfolder_is_loaded_and_checked(written, model, tmp_path):
    """The weights belong to the config.json beside them. There may be another model above."""
    make_model(num_hidden_layers=1).save_pretrained(tmp_path)
    place = tmp_path / "some" / "rana"
    if written == "rana.save":
        rana.save(model, place)
    else:
        model.save_pretrained(place, max_shard_size="40KB" if written == "shards" else "1GB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="some/rana")
    assert_equal_states(model, loaded)
    weights = sorted(place.glob("*.safetensors"))[0]
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointError, match="is damaged"):
        AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="some/rana")


@pytest.mark.parametrize("away", ["..", "../other", "within"])
def test_weights_without_their_config_beside_them_are_outside(away, model, tmp_path):
    place = tmp_path / "some" / "rana"
    model.save_pretrained(place, max_shard_size="40KB")
    other = (place / away).resolve()
    other.mkdir(exist_ok=True)
    index = place / "model.safetensors.index.json"
    for shard in place.glob("*.safetensors"):
        shard.rename(other / shard.name)
        index.write_text(index.read_text().replace(f'"{shard.name}"', f'"{away}/{shard.name}"'))
    for given, how in ((place, {}), (tmp_path, {"subfolder": "some/rana"})):
        with pytest.raises(CheckpointError, match="refers to weights outside of it"):
            AutoModelForCausalLM.from_pretrained(given, **how)


# writing


def test_saving_replaces_a_checkpoint_and_nothing_else(model, checkpoint, tmp_path):
    (checkpoint / "notes.txt").write_text("of the old one")
    rana.save(model, checkpoint)
    left = {path.name for path in checkpoint.iterdir()}
    assert left == {*read_manifest(checkpoint).files, "generation_config.json", MANIFEST, CARD}
    other = tmp_path / "thesis"
    other.mkdir()
    rana.save(model, other)  # an empty directory is no loss
    (tmp_path / "file").write_text("")
    (other / MANIFEST).unlink()
    for place in (other, tmp_path / "file"):
        with pytest.raises(FileExistsError, match="it is not overwritten"):
            rana.save(model, place)
    assert (other / WEIGHTS).exists()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "thesis", "file"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no space left")])
def test_an_interrupted_save_leaves_the_old_one(error, model, checkpoint, monkeypatch):
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}

    def interrupted(self, directory):
        (Path(directory) / WEIGHTS).write_bytes(b"half")
        raise error

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", interrupted)
    with pytest.raises(type(error) if isinstance(error, OSError) else error):
        rana.save(model, checkpoint)
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before
    assert [path.name for path in checkpoint.parent.iterdir()] == ["checkpoint"]


def test_a_failed_exchange_puts_the_old_one_back(model, checkpoint, monkeypatch):
    rename = Path.rename

    def failing(self, target):
        if self.name == "new":
            raise OSError("the disk is gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="the disk is gone"):
        rana.save(model, checkpoint)
    assert_equal_states(model, rana.load(checkpoint))


def test_a_model_that_was_not_compressed_is_told_so(tmp_path):
    with pytest.raises(ValueError, match="LlamaForCausalLM is not a compressed transformers model"):
        rana.save(make_model(num_hidden_layers=1), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# other processes


def test_without_the_package_transformers_stops(original):
    """The empty `weight` of every adapted linear is what it trips over, instead of inventing weights."""
    code = (
        "import sys; from transformers import AutoModelForCausalLM;"
        "AutoModelForCausalLM.from_pretrained(sys.argv[1]); print('loaded')"
    )
    done = python("-c", code, str(original))
    assert done.returncode != 0 and "loaded" not in done.stdout
    assert "RuntimeError" in done.stderr and "mismatch" in done.stderr


def test_importing_the_package_is_enough_and_does_not_import_transformers(original):
    code = (
        "import sys, rana_kernels; assert 'transformers' not in sys.modules;"
        "from transformers import AutoModelForCausalLM;"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]); print(type(model.model.layers[0].mlp))"
    )
    done = python("-c", code, str(original))
    assert "RanaMLP" in done.stdout, done.stderr


def test_the_package_works_without_transformers():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import rana_kernels as rana; rana.report()\n"
        "try: rana.load('x')\n"
        "except ImportError as error: print(error)"
    )
    done = python("-c", code)
    assert "rana_kernels.load needs transformers: pip install" in done.stdout, done.stderr
