"""Files that torch.save wrote: released models load, answer as they did, and can be kept; hostile ones do nothing."""

from __future__ import annotations

import argparse
import os
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.layers.drop import DropPath
from timm.layers.format import Format
from torch import Tensor, nn

from isomorphic.checkpoints.open import load_model, load_weights, open_model
from isomorphic.checkpoints.released.legacy import read_pickle
from isomorphic.checkpoints.save import check_savable, save_model
from isomorphic.errors import UserError
from isomorphic.measure.complexity import count_complexity
from isomorphic.models import ModelSpec
from tests.faults import one_line

RELEASED = sorted((Path(__file__).parents[3] / "data" / "legacy").glob("*/*[a-z0-9].pth"))
DEIT: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 10}
FRESH: dict[str, tuple[str, dict[str, Any], int]] = {
    "deit": ("deit_tiny_distilled_patch16_224", DEIT, 16),
    "deit3": ("deit3_small_patch16_224", DEIT, 16),
    "convnext": ("convnext_tiny", {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32), "drop_path_rate": 0.2}, 32),
    "swin": (
        "swin_tiny_patch4_window7_224", {"img_size": 56, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}, 56,
    ),
    "resnet": ("resnet26d", {"channels": (8, 8, 16, 16), "num_classes": 10}, 32),
    "regnet": ("regnety_002", {"num_classes": 10}, 32),
}  # fmt: skip


def recorded(path: Path) -> dict[str, Any]:
    return torch.load(path.with_suffix(".io.pt"), weights_only=True)


def error_of(model: nn.Module, path: Path, key: str = "logits") -> float:
    """The largest difference from the logits that were recorded beside a file."""
    with torch.no_grad():
        return (model(recorded(path)["input"]) - recorded(path)[key]).abs().max().item()


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


# --- released files ---

released = pytest.mark.parametrize("path", RELEASED, ids=lambda path: f"{path.parent.name}-{path.stem}")


def test_there_are_files_of_five_kinds_and_two_versions():
    assert len(RELEASED) == 10


class Attribute:
    """Is pickled as `getattr(owner, name)`, which is how Pythons before 3.11.4 write the members of an enumeration."""

    def __init__(self, owner: Any, name: str) -> None:
        self.how = (getattr, (owner, name))

    def __reduce__(self) -> Any:
        return self.how


def test_members_of_an_enumeration_as_early_pythons_write_them(tmp_path: Path):
    model: Any = timm.create_model(FRESH["deit"][0], **FRESH["deit"][1])
    model.patch_embed.output_fmt = Attribute(Format, "NHWC")
    torch.save(model, tmp_path / "model.pth")
    loaded: Any = load_model(tmp_path / "model.pth")
    assert loaded.patch_embed.output_fmt is Format.NHWC
    for owner, name in ((nn.Linear, "forward"), (Format, "__class__"), (torch.Size, "count")):
        model.patch_embed.output_fmt = Attribute(owner, name)
        torch.save(model, tmp_path / "model.pth")
        with pytest.raises(UserError):
            load_model(tmp_path / "model.pth")


def test_other_endings_are_told_by_their_first_bytes(tmp_path: Path):
    shutil.copy(RELEASED[0], tmp_path / "model.bin")
    assert isinstance(load_model(tmp_path / "model.bin"), nn.Module)
    (tmp_path / "text.bin").write_text("no pickle")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_model(tmp_path / "text.bin")


@released
def test_a_released_file_answers_as_it_did_and_costs_as_much(path: Path):
    model, spec = open_model(path, input_size=recorded(path)["input"].shape[-1])
    assert not model.training
    assert error_of(model, path) < 1e-4
    complexity = count_complexity(model, recorded(path)["input"][:1])
    assert (complexity.macs_paper, complexity.params) == (recorded(path)["macs"], recorded(path)["params"])
    assert spec.kwargs["num_classes"] == 10 and spec.preprocessing.input_size == recorded(path)["input"].shape[-1]


@released
def test_a_released_file_can_be_kept_in_our_format(path: Path, tmp_path: Path):
    name = "convnext_tiny" if path.stem.startswith("convnext") else None  # it says convnext_base, which takes longer
    model, spec = open_model(path, name=name, input_size=recorded(path)["input"].shape[-1])
    check_savable(path, model, spec)
    save_model(tmp_path / "kept.safetensors", model, spec, provenance={})
    reloaded = load_model(tmp_path / "kept.safetensors")
    assert error_of(reloaded, path) < 1e-4
    complexity = count_complexity(reloaded, recorded(path)["input"][:1])
    assert (complexity.macs_paper, complexity.params) == (recorded(path)["macs"], recorded(path)["params"])

    def drop_paths(network: nn.Module) -> dict[str, float]:
        return {name: m.drop_prob for name, m in network.named_modules() if isinstance(m, DropPath)}

    assert drop_paths(reloaded) == drop_paths(model)  # which eval mode does not show


@released
def test_a_released_file_can_be_trained(path: Path):
    model = load_model(path).train()
    images = recorded(path)["input"]
    nn.functional.cross_entropy(model(images), torch.arange(len(images))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("version", ["0.9.2", "1.0.7"])
def test_averaged_weights_go_first(version: str):
    path = next(p for p in RELEASED if p.parent.name == f"timm_{version}" and p.stem == "convnext_finetuned")
    assert error_of(load_model(path, use_ema=True), path) < 1e-4
    raw = load_model(path, use_ema=False)
    assert error_of(raw, path, "logits_state_dict") < 1e-4 < error_of(raw, path)


def test_what_a_file_says_of_its_model():
    spec = {path.stem: open_model(path)[1] for path in RELEASED[:5]}
    assert {stem: (s.builder, s.name) for stem, s in spec.items()} == {
        "convnext_finetuned": ("timm", "convnext_base.fb_in1k"),
        "deit": ("timm", "deit_tiny_distilled_patch16_224.fb_in1k"),
        "deit_finetuned": ("timm", "deit_tiny_distilled_patch16_224.fb_in1k"),
        "mobilenet_v2": ("torchvision", "mobilenet_v2"),
        "swin": ("timm", "swin_tiny_patch4_window7_224.ms_in1k"),
    }
    assert spec["deit"].kept_blocks == {"blocks": (0, 1, 2)} and spec["mobilenet_v2"].kept_blocks == {}
    assert spec["convnext_finetuned"].kept_blocks["stages.2.blocks"] == (0, 1)
    assert spec["convnext_finetuned"].kwargs == {"num_classes": 10, "drop_path_rate": 0.1}
    transform = spec["swin"].preprocessing
    assert (transform.input_size, transform.resize_size, transform.interpolation) == (56, 64, "bicubic")
    assert spec["mobilenet_v2"].preprocessing.interpolation == "bilinear"


# --- whole models of today ---


@pytest.mark.parametrize("family", FRESH)
def test_whole_models_of_all_families_load(family: str, tmp_path: Path):
    name, kwargs, size = FRESH[family]
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    path = saved(model, tmp_path / "model.pth")
    loaded, spec = open_model(path, input_size=size)
    assert {type(m) for m in loaded.modules()} == {type(m) for m in model.modules()}
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    check_savable(path, loaded, spec)
    assert spec.name.split(".")[0] == name


def test_models_that_were_saved_on_a_gpu_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = timm.create_model("test_resnet", num_classes=10)
    with monkeypatch.context() as patched:
        patched.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        path = saved(model, tmp_path / "gpu.pth")
    loaded = load_model(path)
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
    assert torch.equal(logits(loaded), logits(model))


def test_models_of_torchvision_load_and_their_name_can_be_given(tmp_path: Path):
    model = torchvision.models.resnet18(num_classes=3).eval()
    path = saved(model, tmp_path / "model.pt")
    loaded, spec = open_model(path)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert loaded._norm_layer is nn.BatchNorm2d
    with pytest.raises(UserError, match=r"could not be saved \(unknown timm model: ResNet .*convert it first.*--name"):
        check_savable(path, loaded, spec)
    loaded, spec = open_model(path, name="resnet18", builder="torchvision")
    assert spec == ModelSpec("torchvision", "resnet18", {"num_classes": 3}, spec.preprocessing)
    check_savable(path, loaded, spec)
    loaded, spec = open_model(path, name="resnet34", builder="torchvision")
    check_savable(path, loaded, spec)  # a shorter one
    loaded, spec = open_model(path, name="resnet50", builder="torchvision")
    with pytest.raises(UserError, match=r"could not be saved .*convert it first") as error:
        check_savable(path, loaded, spec)
    one_line(error)


def test_models_by_name_and_our_checkpoints_need_no_conversion():
    spec = ModelSpec("timm", "resnet18")
    for source in ("resnet18", "some/file.safetensors"):
        check_savable(source, nn.Identity(), spec)


def test_reading_leaves_torchs_own_list_alone():
    with torch.serialization.safe_globals([argparse.Namespace]):
        before = set(torch.serialization.get_safe_globals())
        load_model(next(path for path in RELEASED if path.stem == "deit_finetuned"))
        assert set(torch.serialization.get_safe_globals()) == before


# --- weights alone ---


def resnet() -> nn.Module:
    torch.manual_seed(1)
    return timm.create_model("resnet18", num_classes=10, channels=(4, 4, 8, 8)).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.ones(1, 3, 32, 32))


FORMS: dict[str, Callable[[nn.Module], Any]] = {
    "bare": lambda model: model.state_dict(),
    "model": lambda model: {"model": model.state_dict(), "args": argparse.Namespace(lr=0.1), "epoch": 3},
    "whole": lambda model: model,
    "of several processes": lambda m: {"state_dict": {f"module.{k}": v for k, v in m.state_dict().items()}},
    "averaged": lambda m: {
        "model_ema": {"n_averaged": torch.tensor(3)} | m.state_dict(),
        "model": {"x": torch.ones(1)},
    },
    "no averaged ones": lambda model: {"model_ema": None, "state_dict": model.state_dict()},
    "compiled": lambda m: {f"_orig_mod.{k}": v for k, v in m.state_dict().items()},
    "compiled, of several processes": lambda m: {f"module._orig_mod.{k}": v for k, v in m.state_dict().items()},
    "several processes, compiled": lambda m: {f"_orig_mod.module.{k}": v for k, v in m.state_dict().items()},
    "a whole one twice": lambda m: {"model": m, "state_dict_ema": m, "best": [argparse.Namespace(of={"a": m})]},
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_load_into_a_built_model(form: str, tmp_path: Path):
    trained, model = resnet(), timm.create_model("resnet18", num_classes=10, channels=(4, 4, 8, 8))
    load_weights(model, saved(FORMS[form](trained), tmp_path / "weights.pth"))
    assert torch.equal(logits(model), logits(trained))


def test_weights_of_our_own_checkpoints_and_of_older_versions_load(tmp_path: Path):
    path = next(p for p in RELEASED if p.parent.name == "timm_0.9.2" and p.stem == "swin")
    model, spec = open_model(path)
    save_model(tmp_path / "kept.safetensors", model, spec, provenance={})
    stored = read_pickle(path).state_dict()
    assert "layers.0.blocks.1.attn_mask" in stored  # which is not stored any more
    for source in (tmp_path / "kept.safetensors", saved(stored, tmp_path / "weights.pth")):
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        load_weights(model, source)
        assert error_of(model, path) < 1e-4


def test_weights_open_with_the_name_of_their_model(tmp_path: Path):
    trained = timm.create_model("test_resnet", num_classes=10)
    path = saved({"state_dict": trained.state_dict()}, tmp_path / "weights.pth.tar")
    model, spec = open_model(path, name="test_resnet", kwargs={"num_classes": 10})
    assert torch.equal(logits(model), logits(trained)) and spec.kwargs == {"num_classes": 10}
    with pytest.raises(UserError, match="holds weights without their model: give the model's name") as error:
        open_model(path)
    one_line(error)
    with pytest.raises(UserError, match="unknown timm model: local-dir:"):
        open_model(path, name="local-dir:/x")
    saved({"arch": "local-dir:/x", "state_dict": trained.state_dict()}, path)
    with pytest.raises(UserError, match="holds weights without their model"):
        open_model(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("fc.bias"), r"does not fit the model: fc.bias is missing$"),
        (lambda state: state.update(stranger=torch.ones(1)), "stranger is none of its tensors$"),
        (lambda state: state.update({"fc.bias": torch.ones(3), "x": torch.ones(1)}), r"tensors \(and 1 more\)"),
        (lambda state: state.update({"fc.bias": torch.ones(3)}), r"fc.bias is \(3,\), not \(10,\)$"),
        (lambda state: state.update(forward=torch.ones(3)), "forward is none of its tensors"),
        (lambda state: state.update(epoch=3), "holds neither a model nor weights"),
    ],
)
def test_weights_must_be_exactly_the_models(change: Callable[[Any], Any], message: str, tmp_path: Path):
    model = resnet()
    before, state = logits(model), dict(resnet().state_dict())
    state["conv1.weight"] = torch.zeros_like(state["conv1.weight"])
    change(state)
    with pytest.raises(UserError, match=message) as error:
        load_weights(model, saved(state, tmp_path / "weights.pth"))
    one_line(error)
    assert torch.equal(logits(model), before)


def test_averaged_weights_must_be_there_when_they_are_asked_for(tmp_path: Path):
    path = saved({"model": resnet().state_dict()}, tmp_path / "weights.pth")
    averaged = saved({"state_dict_ema": resnet().state_dict()}, tmp_path / "averaged.pth")
    load_weights(resnet(), path, use_ema=False)
    for source, use_ema in ((path, True), (averaged, False), (tmp_path / "x.safetensors", True)):
        with pytest.raises(UserError, match="averaged weights.*leave out") as error:
            load_weights(resnet(), source, use_ema=use_ema)
        one_line(error)
    with pytest.raises(UserError, match="averaged weights"):
        open_model("resnet18", use_ema=True)


@pytest.mark.parametrize(
    "content", [3, [1, 2], {}, {"epoch": 3}, {"model": 5}, {"state_dict": [torch.ones(1)]}], ids=str
)
def test_files_of_something_else(content: Any, tmp_path: Path):
    path = saved(content, tmp_path / "other.pth")
    with pytest.raises(UserError, match="other.pth holds neither a model nor weights") as error:
        load_model(path)
    one_line(error)


# --- hostile and damaged files ---


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


BOMBS: dict[str, tuple[Callable[[str], Any], str]] = {
    "a command": (lambda file: Call(os.system, f"touch {file}"), r"it wants posix\.system"),
    "a file": (lambda file: Call(open, file, "w"), r"it wants (_io|io)\.open"),
    "an evaluation": (lambda file: Call(eval, f"open({file!r}, 'w')"), r"it wants (builtins\.)?eval"),
    "a module's import": (lambda file: Call(__import__, "os"), r"it wants (builtins\.)?__import__"),
    "a layer of torch that runs what it reads": (lambda file: Call(torch.jit.load, file), r"it wants torch\.jit"),
}
WRAPPINGS: dict[str, Callable[[Any], Any]] = {
    "bare": lambda bomb: bomb,
    "beside weights": lambda bomb: {"model": resnet(), "args": argparse.Namespace(x=bomb)},
    "in a model": lambda bomb: {"state_dict_ema": resnet(), "model": nn.ModuleList([holding(bomb)])},
}


def holding(value: Any) -> nn.Module:
    module = nn.Linear(1, 1)
    module.extra = value
    return module


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_pickle_that_names_anything_else_is_refused(bomb: str, wrapping: str, tmp_path: Path):
    make, message = BOMBS[bomb]
    marker = tmp_path / "code-was-run"
    path = saved(WRAPPINGS[wrapping](make(str(marker))), tmp_path / "bomb.pth")
    for load in (load_model, lambda path: load_weights(resnet(), path)):
        with pytest.raises(UserError, match=rf"bomb.pth is refused: {message}.*--trust-checkpoint") as error:
            load(path)
        one_line(error)
    torch.save(WRAPPINGS[wrapping](make(str(marker))), path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=rf"bomb.pth is refused: ({message}|it refers to something)") as error:
        load_model(path)
    one_line(error)
    assert not marker.exists()


def test_trust_lets_a_file_run_what_it_names(tmp_path: Path):
    marker = tmp_path / "code-was-run"
    content = {"model": resnet(), "args": Call(open, str(marker), "w")}
    path = saved(content, tmp_path / "trusted.pth")
    assert torch.equal(logits(load_model(path, trust=True)), logits(resnet()))
    assert marker.exists()
    saved(Call(eval, "1 / 0"), path)
    with pytest.raises(UserError, match="trusted.pth is not a whole file.*division by zero") as error:
        load_model(path, trust=True)
    one_line(error)


def test_layers_are_filled_and_never_constructed(tmp_path: Path):
    path = saved({"model": Call(nn.Linear, 3, 4)}, tmp_path / "calls.pth")
    with pytest.raises(UserError, match="is refused: it wants to construct Linear, not to fill one") as error:
        load_model(path)
    one_line(error)


def hooked(model: nn.Module) -> None:
    model._forward_hooks[0] = nn.Identity()  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.__dict__.update(forward=nn.Identity()), "its ResNet comes with forward of its own"),
        (lambda m: m.fc.__dict__.update(named_modules=nn.Linear), "its Linear comes with named_modules of its own"),
        (hooked, "its ResNet comes with _forward_hooks of its own"),
    ],
)
def test_a_pickle_sets_no_method_and_no_hook(change: Callable[[Any], Any], message: str, tmp_path: Path):
    model = resnet()
    change(model)
    with pytest.raises(UserError, match=f"is refused: {message}") as error:
        load_model(saved(model, tmp_path / "model.pth"))
    one_line(error)


def broken(change: Callable[[Any], Any], make: Callable[[], nn.Module] = resnet) -> nn.Module:
    model = make()
    change(model)
    return model


def rated(rate: Any) -> nn.Module:
    """A network whose drop path has any rate."""
    model = timm.create_model("convnext_tiny", **FRESH["convnext"][1])
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = rate
    return model


def configured(**config: Any) -> Callable[[], nn.Module]:
    whole = {"architecture": "resnet18", "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear"}
    return lambda: broken(lambda m: m.__dict__.update(pretrained_cfg=whole | config))


def unsized() -> nn.Module:
    model: Any = resnet()
    del model.fc.__dict__["out_features"], model.__dict__["num_classes"]
    return model


CONTRADICTIONS: dict[str, Callable[[], nn.Module]] = {
    **{f"rate {rate}": lambda rate=rate: rated(rate) for rate in ("a", None, [1], float("nan"), float("inf"), -1, 1)},
    **{f"classes {n}": lambda n=n: broken(lambda m: setattr(m, "num_classes", n)) for n in (-1, True, 10**400)},
    "no size": configured(architecture="x", input_size=None),
    "a size of text": configured(architecture="x", input_size=("a",)),
    "seven means": configured(mean=(0,) * 7),
    "no deviation": configured(std=(0,) * 3),
    "no mean": configured(mean=(float("nan"),) * 3),
    "infinite size": configured(architecture="x", input_size=(3, float("inf"))),
    "huge size": configured(architecture="x", input_size=(3, 10**6)),
    "layer without sizes": unsized,
    "a module in itself": lambda: broken(lambda m: m._modules.update(fc=m)),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_models_that_contradict_themselves_are_named_in_one_line(case: str, tmp_path: Path):
    with pytest.raises(UserError, match="model.pth is not a whole file that torch.save wrote of a model") as error:
        open_model(saved(CONTRADICTIONS[case](), tmp_path / "model.pth"))
    one_line(error)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_models_of_any_precision_are_loaded_in_single(dtype: torch.dtype, tmp_path: Path):
    path = saved(resnet().to(dtype), tmp_path / "model.pth")
    loaded, weights = load_model(path), resnet()
    load_weights(weights, path)
    for model in (loaded, weights):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert torch.equal(logits(model), logits(resnet().to(dtype).float()))


def test_arguments_beside_a_whole_model_are_refused(tmp_path: Path):
    path = saved(resnet(), tmp_path / "model.pth")
    beside: list[dict[str, Any]] = [{"kwargs": {"num_classes": 3}}, {"builder": "torchvision"}]
    for options in beside:
        with pytest.raises(UserError, match="model.pth holds a whole model, which is as it is: leave out") as error:
            open_model(path, **options)
        one_line(error)


def test_tensors_under_the_names_of_models_are_no_models(tmp_path: Path):
    with pytest.raises(UserError, match="does not fit the model"):
        load_weights(resnet(), saved({"model": torch.ones(2)}, tmp_path / "weights.pth"))


def test_modules_that_are_none_are_damage(tmp_path: Path):
    model = resnet()
    model._modules["fc"] = 5  # type: ignore[assignment]
    with pytest.raises(UserError, match="model.pth is not a whole file") as error:
        load_model(saved(model, tmp_path / "model.pth"))
    one_line(error)
    model = timm.create_model("deit_tiny_patch16_224", **DEIT)
    model.__dict__["pretrained_cfg"] = {"architecture": ["deit"], "mean": "grey", "input_size": None}
    spec = open_model(saved(model, tmp_path / "model.pth"))[1]
    assert spec.name == "VisionTransformer" and spec.preprocessing.input_size == 16


def test_a_file_cut_short_anywhere_is_named_in_one_line(tmp_path: Path):
    whole, path = RELEASED[0].read_bytes(), tmp_path / "short.pth"
    for length in [*range(8), *range(8, len(whole), len(whole) // 40), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="short.pth is not a whole file that torch.save wrote") as error:
            load_model(path)
        one_line(error)


def test_files_of_other_kinds_are_named_in_one_line(tmp_path: Path):
    path = tmp_path / "other.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.txt", "nothing")
    with pytest.raises(UserError, match="other.pth is not a whole file") as error:
        load_model(path)
    one_line(error)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions call it deprecated
        torch.jit.save(torch.jit.trace(nn.Linear(1, 1), torch.ones(1)), path)
    with pytest.raises(UserError, match="other.pth is a TorchScript archive, which is a program") as error:
        load_model(path)
    one_line(error)
    for content in (b"text", pickle.dumps({"x": 1}), pickle.dumps(Call(os.mkdir, str(tmp_path / "code-was-run")))):
        path.write_bytes(content)
        with pytest.raises(UserError, match="other.pth is (not a whole file|refused)") as error:
            load_model(path)
        one_line(error)
    assert not (tmp_path / "code-was-run").exists()
    (tmp_path / "folder.pth").mkdir()
    for missing in ("folder.pth", "missing.pth"):
        with pytest.raises(UserError, match=f"no such checkpoint: .*{missing}"):
            load_model(tmp_path / missing)
