"""The page about a cut, from the shell: written, carried over into finetuned models, and looked at in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import isomorphic as iso
from isomorphic.checkpoints.open import read_header

from .conftest import Finished

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
SMALL = ("--dataset", "synthetic", "--workers", "0", "--batch-size", "4")
VIT = ("--model", "vit_tiny_patch16_224", "--no-pretrained", "--input-size", "32", "--model-kwargs")
VIT += ("patch_size=8", "embed_dim=24", "depth=2", "num_heads=3", "num_classes=5")


def facts_on(page: Path) -> list[dict[str, Any]]:
    found = re.search(r'id="facts">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])


def test_prune_finetune_and_report(call: Callable[..., Finished], tmp_path: Path):
    flags = ("--taylor-batches", "1", "--target-macs", "60%", "--report", "page.html", "--recover", "compensate")
    done = call("prune.py", *VIT, *SMALL, *flags, "--save-as", "p.safetensors")
    assert done.status == 0, done.err
    assert done.out.splitlines()[-2:] == [
        "Saving the pruned model to p.safetensors",
        "Saving the page about the cut to page.html",
    ]
    (page,) = facts_on(tmp_path / "page.html")
    stored = read_header(tmp_path / "p.safetensors")["provenance"]
    assert page["cut"] == stored["cut"] and page["cut"]["after"]["params"] == stored["params"]
    assert page["cut"]["asked"]["macs"] == "60%" and page["cut"]["errors"]
    assert all(stage["seconds"] for stage in page["cut"]["stages"]), "times are measured where a page is asked for"

    training = ("--epochs", "1", "--lr", "0.001", "--input-size", "32", "--synthetic-size", "8")
    done = call("finetune.py", "--model", "p.safetensors", *SMALL, *training, "--output-dir", "run")
    assert done.status == 0, done.err
    assert "cut" not in json.loads((tmp_path / "run" / "run.json").read_text())
    done = call("tools/report.py", "p.safetensors", "run/best.safetensors", "--output", "both.html")
    assert (done.status, done.out) == (0, "Saving the page to both.html\n")
    first, second = facts_on(tmp_path / "both.html")
    assert {**second["cut"], "command": ""} == first["cut"] and "prune.py" in second["cut"]["command"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing.safetensors"], "nothing.safetensors"),
        (["text.safetensors"], "text.safetensors is"),
        (["text.safetensors", "--output", "page.pdf"], "page.pdf must end in .html"),
        (["text.safetensors", "--output", "text.safetensors/page.html"], "cannot write"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str, call: Callable[..., Finished], tmp_path: Path):
    (tmp_path / "text.safetensors").write_text("no checkpoint")
    done = call("tools/report.py", *words)
    assert done.status in (1, 2) and message in done.err[-1] and not list(tmp_path.glob("*.html"))


@pytest.mark.parametrize("flags", [["--report", "p.html", "--dry-run", "--pruning-ratio", "0.5"]])
def test_a_dry_run_has_nothing_to_compare(flags: list[str], call: Callable[..., Finished]):
    done = call("prune.py", *VIT, *SMALL, *flags)
    assert done.status == 2 and "--dry-run cuts nothing" in done.err[-1]


# Runs inside a page: what sticks out of the window, which texts overlap, which lie outside of their picture.
LOOK = """
<script>
const found = [];
if (document.documentElement.scrollWidth > innerWidth) found.push("wider than the window");
const boxes = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let node = walker.nextNode(); node; node = walker.nextNode()) {
  const parent = node.parentElement;
  if (!node.textContent.trim() || parent.closest("script, style") || !parent.getClientRects().length) continue;
  const range = document.createRange();
  range.selectNodeContents(node);
  const scrolls = parent.closest(".table");
  for (const box of range.getClientRects()) boxes.push({box, text: node.textContent, scrolls});
}
for (const {box, text, scrolls} of boxes)
  if (!scrolls && (box.left < -1 || box.right > innerWidth + 1)) found.push("cut off: " + text);
for (let i = 0; i < boxes.length; i++) for (let j = i + 1; j < boxes.length; j++) {
  const a = boxes[i].box, b = boxes[j].box;
  const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
  const tall = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
  if (wide > 2 && tall > 4) found.push("overlap: " + boxes[i].text + " | " + boxes[j].text);
}
for (const text of document.querySelectorAll("svg text")) {
  const inner = text.getBoundingClientRect(), outer = text.closest("svg").getBoundingClientRect();
  if (inner.left < outer.left - 1 || inner.right > outer.right + 1 || inner.height < 9)
    found.push("unreadable: " + text.textContent);
}
const kept = [...document.querySelectorAll(".layer .number")].map(e => e.innerText.split("\\n").pop().split(" ").pop());
const out = document.createElement("pre");
out.id = "seen";
out.textContent = JSON.stringify({found, kept, width: innerWidth});
document.body.append(out);
</script>
"""


def seen_in_browser(page: Path, width: int) -> dict[str, Any]:
    """What a headless browser finds on a page in a window of `width` pixels."""
    assert BROWSER
    looked = page.with_name("looked.html")
    # A window has a smallest width of its own, so that a narrow one is a frame in a wide one.
    looked.write_text(page.read_text().replace("</body>", f"{LOOK}</body>"))
    frame = page.with_name("frame.html")
    frame.write_text(
        f'<iframe src="looked.html" style="width:{width}px;height:2000px;border:0"></iframe><script>onload = () => '
        '{ document.title = frames[0].document.getElementById("seen").textContent }</script>'
    )
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={page.parent / 'profile'}", "--window-size=1400,2000", "--virtual-time-budget=5000"]
    done = subprocess.run([*command, "--dump-dom", frame.as_uri()], capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title, done.stderr[-2000:]
    return json.loads(title[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))


class Segmenter(nn.Module):
    """A user's net: an encoder, a decoder, and a connection past both."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 32, 3, 2, 1), nn.Conv2d(32, 64, 3, 2, 1)
        self.up, self.head = nn.ConvTranspose2d(64, 32, 2, 2), nn.Conv2d(64, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shallow = self.down(x).relu()
        return self.head(torch.cat([self.up(self.deep(shallow).relu()), shallow], dim=1))


@pytest.mark.skipif(not BROWSER, reason="needs chromium, which is no package of Python")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_every_word_and_the_checkpoints_widths(width: int, tmp_path: Path):
    torch.manual_seed(0)
    pruned = iso.prune(Segmenter(), torch.randn(1, 3, 16, 16), ratio=0.5, criterion="l2")
    pruned.report(tmp_path / "page.html")
    seen = seen_in_browser(tmp_path / "page.html", width)
    assert seen["width"] == width and seen["found"] == []
    assert seen["kept"] == [str(layer.after) for layer in pruned.facts.layers]
