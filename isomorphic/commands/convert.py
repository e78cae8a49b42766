"""What tools/convert.py does: open a file, save it as a checkpoint, and hold what was saved against it."""

from __future__ import annotations

import argparse
from pathlib import Path

from isomorphic import progress
from isomorphic.checkpoints.open import load_model, open_model
from isomorphic.checkpoints.save import check_savable, same_logits, save_model
from isomorphic.checkpoints.sources import PTH, is_folder, is_pth, weights_file
from isomorphic.commands import entry, flags
from isomorphic.commands.replacing import check_outputs
from isomorphic.errors import UserError
from isomorphic.files import check_writable
from isomorphic.measure.complexity import count_complexity
from isomorphic.measure.results import complexity_line, complexity_results
from isomorphic.models import check_input_size, check_logits, example_inputs, num_classes
from isomorphic.provenance import file_sha256, run_provenance


def parse_args() -> argparse.Namespace:
    parser = flags.make_parser("Convert a .pth file into a checkpoint of this project.")
    add = parser.add_argument
    add("source", metavar="IN.pth", help="a whole model, a dict that holds one, weights, or a folder of weights")
    add("output", type=flags.checkpoint_file, metavar="OUT.safetensors")
    add("--name", help="the dense model that IN was made from (default: what IN says)")
    add("--is-torchvision", action="store_true", help="the name is torchvision's, not timm's")
    add(
        "--model-kwargs",
        nargs="*",
        action="extend",
        type=flags.key_value,
        default=[],
        metavar="KEY=VALUE",
        help="for the model's builder",
    )
    add("--input-size", type=flags.positive_int, help="side of the model's input in pixels (default: its own)")
    add("--use-ema", action=argparse.BooleanOptionalAction, help="IN's averaged weights (default: if it has any)")
    flags.add_overwrite_argument(add)
    add("--trust-checkpoint", action="store_true", help="let IN run the code that it names")
    args = parser.parse_args()
    if not (args.name or is_pth(args.source) or is_folder(args.source)):
        parser.error(
            f"argument IN.pth: {args.source} must end in {' or '.join(PTH)}, or have its model named by --name"
        )
    if args.is_torchvision and not args.name:
        parser.error("--is-torchvision needs --name")
    return args


def main() -> None:
    args = parse_args()
    check_writable(args.output)
    check_outputs({"OUT.safetensors": args.output}, overwrite=args.overwrite)
    progress.stage(f"opening {args.source}")
    model, spec = open_model(
        args.source,
        builder="torchvision" if args.is_torchvision else "timm",
        name=args.name,
        kwargs=dict(args.model_kwargs),
        input_size=args.input_size,
        use_ema=args.use_ema,
        trust=args.trust_checkpoint,
        tell=entry.say,
    )
    answer = check_input_size(model, spec.preprocessing.input_size, args.source)
    check_logits(answer, num_classes(model, spec), args.source)
    check_savable(args.source, model, spec)

    progress.stage(f"saving {args.output}")
    complexity = count_complexity(model, example_inputs(spec))
    provenance = run_provenance(vars(args)) | complexity_results(complexity)
    provenance |= {"source": Path(args.source).name, "parent": file_sha256(weights_file(args.source))}
    save_model(args.output, model, spec, provenance=provenance)
    progress.stage("checking what was saved")
    if not same_logits(model, load_model(args.output), spec):
        Path(args.output).unlink()
        raise UserError(f"{args.output} did not answer as {args.source} does when it was loaded again")
    entry.say(complexity_line(complexity))
    entry.say(f"Saving the converted model to {args.output}")
