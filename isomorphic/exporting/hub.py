"""A folder as the Hugging Face hub has them, its check, and its upload.

model.safetensors    the checkpoint, byte for byte
config.json          how the dense model is built, what the model costs, the checkpoint's SHA-256
README.md            the model card
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from isomorphic import progress
from isomorphic.checkpoints.headers import has_header
from isomorphic.checkpoints.hub import CHECKPOINT
from isomorphic.checkpoints.open import is_checkpoint, is_pth, load_model, open_model, read_header, source_file
from isomorphic.checkpoints.save import save_model
from isomorphic.checkpoints.sources import weights_file
from isomorphic.errors import UserError, first_line
from isomorphic.exporting import pt2
from isomorphic.exporting.answers import BATCH_SIZES, BOUND, Answer, Difference, ask, difference
from isomorphic.exporting.card import PROJECT, compare_sizes, model_card
from isomorphic.exporting.result import Exported, check_bound
from isomorphic.files import check_writable
from isomorphic.inputs import Inputs, map_tensors, tensors_in
from isomorphic.models import ModelSpec, example_inputs, quiet_hub
from isomorphic.provenance import file_sha256, run_provenance

FILES = (CHECKPOINT, "config.json", "README.md")


def export_folder(
    source: str | Path, inputs: Inputs | None, path: Path, repository: str | None, options: Mapping[str, Any]
) -> Exported:
    """Makes a folder of a checkpoint, or of a model by name.

    Args:
        source: what `load_model` takes, no `.pth` file; weights of others are saved as a checkpoint.
        inputs: what the model takes; None is one image.
        path: the folder; files of other names in it stay.
        repository: "USER/NAME" that the model card names.
        options: of `open_model`.

    Raises:
        UserError: as `export`; nothing is left behind.
    """
    if is_pth(source):
        raise UserError(f"{source} is no checkpoint: convert it, python tools/convert.py {source} OUT.safetensors")
    check_writable(path / CHECKPOINT)
    progress.stage(f"opening {source}")
    file = _own_file(source)
    is_built_by_user = file is not None and read_header(file)["builder"] == "none"
    opened = None if is_built_by_user else open_model(source, **options)
    with new_folder(path) as temporary:
        progress.stage(f"writing {path}/")
        if file is not None:
            shutil.copyfile(file, temporary / CHECKPOINT)
        elif opened is not None:
            told = {"model": str(source), "no_pretrained": not options.get("pretrained", True)}
            save_model(temporary / CHECKPOINT, *opened, provenance=run_provenance(told))
        write_folder(temporary, path.name, repository, opened)
        progress.stage(f"reading {path}/ back and comparing it with the original")
        answers: list[Answer] = []
        if opened is not None:
            model, spec = opened
            inputs = example_inputs(spec) if inputs is None else inputs
            answers = [ask(model, inputs, size) for size in BATCH_SIZES]
        found = check_folder(temporary, answers, options.get("builder_file") or source_file(str(source)))
        check_bound(path, found, BOUND)
    return Exported(path, tuple(answer.size for answer in answers), found, BOUND)


def _own_file(source: str | Path) -> Path | None:
    """Returns the checkpoint of this project that `source` stands for; None for a name, and for weights of others."""
    file = weights_file(source) if is_checkpoint(source) else None
    return file if file is not None and file.suffix == ".safetensors" and has_header(file) else None


def write_folder(folder: Path, title: str, repository: str | None, opened: tuple[nn.Module, ModelSpec] | None) -> None:
    """Writes config.json and the model card beside a checkpoint.

    Args:
        folder: holds the checkpoint.
        title: the model's name.
        repository: "USER/NAME", where it is known.
        opened: what the checkpoint holds; None where only its user can build it.
    """
    header = read_header(folder / CHECKPOINT)
    sizes = compare_sizes(*opened) if opened else None
    config: dict[str, Any] = {"library_name": PROJECT, "format": header["format"]}
    config |= ModelSpec.from_dict(header).to_dict()
    if sizes is not None:
        config |= vars(sizes.after)
    config["sha256_of_checkpoint"] = file_sha256(folder / CHECKPOINT)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    card = model_card(header, title, repository or f"USER/{title}", sizes)
    (folder / "README.md").write_text(card, encoding="utf-8")


def check_folder(folder: Path, answers: Iterable[Answer], builder_file: str | Path | None = None) -> Difference:
    """Reads a folder back, runs its model, and returns the largest difference to what the original answers.

    Args:
        folder: as `write_folder` leaves it.
        answers: of the original; none where only its user can build it: then the checkpoint's SHA-256 has to do.
        builder_file: of a model of a user's file.

    Raises:
        UserError: the checkpoint is not the one of config.json, or its model does not answer as the original.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["sha256_of_checkpoint"] != file_sha256(folder / CHECKPOINT):
        raise UserError(f"{folder / CHECKPOINT} is not the checkpoint of its config.json")
    found = Difference()
    for answer in answers:
        model = load_model(folder / CHECKPOINT, builder_file=builder_file)
        outputs = tensors_in(pt2.runner(model, map_tensors(answer.inputs, torch.clone))())
        found = max(found, difference(answer, outputs), key=lambda d: d.value)
    return found


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; on success its files are moved there, else it is removed.

    Raises:
        UserError: the folder cannot be written.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        yield temporary
        path.mkdir(exist_ok=True)
        for file in temporary.iterdir():
            os.chmod(file, 0o644)
            os.replace(file, path / file.name)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def upload(folder: Path, repository: str) -> str:
    """Uploads the files of a folder to "USER/NAME", which is made unless it is there; returns its address.

    Raises:
        UserError: there is nobody logged in, the repository is somebody else's, or the hub cannot be reached.
    """
    import huggingface_hub  # slow to import, and few upload
    from huggingface_hub.errors import HFValidationError

    progress.stage(f"uploading {folder}/ to {repository}")
    api = huggingface_hub.HfApi(os.environ.get("HF_ENDPOINT"))
    what = {"allow_patterns": list(FILES), "commit_message": f"Upload {folder.name}"}
    try:
        with quiet_hub():
            address = api.create_repo(repository, exist_ok=True)
            api.upload_folder(repo_id=repository, folder_path=folder, **what)
    except (OSError, HFValidationError) as error:  # all that the hub and the connection raise
        status = getattr(getattr(error, "response", None), "status_code", None)
        hint = "log in with `hf auth login`, as somebody who may write there" if status in (401, 403) else "try again"
        raise UserError(
            f"cannot upload {folder} to {repository}: {first_line(error)}; {hint}. The folder is whole"
        ) from error
    return str(address)
