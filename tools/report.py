#!/usr/bin/env python3
"""Writes a page about a pruned model that opens in any browser: widths, classes, costs, what stayed and why.

python tools/report.py output/deit_4.2G.safetensors --output deit.html
python tools/report.py a.safetensors b.safetensors --output both.html    # side by side
"""

from __future__ import annotations

from isomorphic import progress


def main() -> None:
    from isomorphic.commands import entry, flags
    from isomorphic.files import check_writable
    from isomorphic.page.page import write_page
    from isomorphic.page.subjects import read_subject

    parser = flags.make_parser("Write a page about one pruned model, or about several side by side.")
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help=".safetensors files")
    parser.add_argument("--output", type=flags.page_file, default="report.html", metavar="FILE.html")
    args = parser.parse_args()
    check_writable(args.output)
    subjects = [read_subject(path) for path in progress.Bar(args.checkpoints, desc="Reading", leave=False)]
    write_page(args.output, subjects)
    entry.say(f"Saving the page to {args.output}")


if __name__ == "__main__":
    with progress.telling("loading"):
        from isomorphic.commands import entry

        entry.run(main)
