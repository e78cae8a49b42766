"""What tools/export.py does: from its flags to one call of `export`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from isomorphic.commands import entry, flags, opening
from isomorphic.commands.replacing import check_outputs
from isomorphic.errors import UserError
from isomorphic.exporting.face import export, is_folder
from isomorphic.exporting.hub import FILES, upload
from isomorphic.inputs import Inputs
from isomorphic.user_file import UserFile, is_user_file, load_factory

DESCRIPTION = "Write a model as ONNX, as torch.export's .pt2, or as a folder for the Hugging Face hub, and check it."


def parse_args() -> argparse.Namespace:
    parser = flags.make_parser(DESCRIPTION)
    add = parser.add_argument
    add(
        "source",
        metavar="CHECKPOINT|NAME",
        help="checkpoint, its folder, hf-hub:USER/NAME, model name, FILE.py:factory",
    )
    add("output", metavar="OUT", help="NET.onnx, NET.pt2 or FOLDER/")
    flags.add_builder_arguments(parser)
    add("--input-size", type=flags.positive_int, help="side of the model's input in pixels (default: its own)")
    group = parser.add_argument_group("file")
    add = group.add_argument
    add("--opset", type=flags.positive_int, help="of ONNX (default: torch's)")
    add("--half", action="store_true", help="weights and images in float16")
    add("--fixed-batch", type=flags.positive_int, metavar="N", help="batches of this size only (default: of any)")
    add("--latency", action="store_true", help="time a batch in torch and in what was written")
    add = parser.add_argument_group("hub").add_argument
    add("--push-to-hub", type=flags.not_empty, metavar="USER/NAME", help="upload FOLDER/ to this repository")
    flags.add_overwrite_argument(parser.add_argument)
    args = parser.parse_args()
    check_usage(parser, args)
    return args


def check_usage(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends with a usage error for flags that the kind of output has not."""
    try:
        folder = is_folder(args.output)
    except UserError as error:
        parser.error(str(error))
    of_files = {
        "--opset": args.opset,
        "--half": args.half,
        "--fixed-batch": args.fixed_batch,
        "--latency": args.latency,
    }
    given = [flag for flag, value in of_files.items() if value]
    if folder and given:
        parser.error(f"{given[0]} is of .onnx and .pt2, and {args.output} is a folder")
    if args.opset and not args.output.endswith(".onnx"):
        parser.error(f"--opset is of ONNX, and {args.output} is none")
    if args.push_to_hub and not folder:
        parser.error(f"--push-to-hub uploads a folder: OUT must end in /, unlike {args.output}")


def main() -> None:
    args = parse_args()
    files = {"OUT/": [Path(args.output, name) for name in FILES]} if is_folder(args.output) else {"OUT": [args.output]}
    for kind, paths in files.items():
        for path in paths:
            check_outputs({kind: str(path)}, overwrite=args.overwrite)
    of_a_name: dict[str, Any] = {} if args.no_pretrained is False else {"pretrained": False}
    exported = export(
        args.source,
        own_inputs(args),
        args.output,
        opset=args.opset,
        half=args.half,
        fixed_batch=args.fixed_batch or False,
        latency=args.latency,
        repository=args.push_to_hub,
        builder="torchvision" if args.is_torchvision else "timm",
        kwargs=dict(args.model_kwargs),
        input_size=args.input_size,
        builder_file=args.builder_file,
        trust=args.trust_checkpoint,
        **of_a_name,
    )
    entry.say(str(exported))
    if args.push_to_hub:
        entry.say(f"Uploaded to {upload(Path(args.output), args.push_to_hub)}")


def own_inputs(args: argparse.Namespace) -> Inputs | None:
    """Returns the first inputs of `batches("train")`, where the model's file defines that; None means one image."""
    if is_user_file(args.source) and os.path.isfile(args.source.rpartition(":")[0]):
        file = load_factory(args.source).file
    elif args.builder_file:
        file = UserFile.read(args.builder_file)
    else:
        return None
    batches = file.function("batches")
    return None if batches is None else opening.first_inputs(batches)
