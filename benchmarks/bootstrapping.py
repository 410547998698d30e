"""Bootstrapping, end to end: the paper's ablation on the generated world, or the honest table on real photographs.

Without --data: for every seed one world, one pretrained model, one captioner, one filter; captions by nucleus sampling and by
beam search; then models trained from scratch with the same number of steps on

    none            human pairs and every web text
    filter          human pairs and the web texts the filter keeps
    captioner       human pairs, every web text and every synthetic text
    both            human pairs and the web and synthetic texts the filter keeps (nucleus)
    both, beam      the same with captions written by beam search

The figures are means over seeds, `+-` the standard deviation; `noise` is the share of synthetic texts that the filter drops,
as in the paper's table 2.

With --data DIR, a folder with clean/captions.json (COCO captions with splits) and clean/images: for every seed a draw of human
and web images, of planted noise, calibration images, initial weights and sampling. A judge that saw human pairs alone gives
every web text a probability. Then a model per row, at its own best number of steps and learning rate, chosen on the val split
by TR@1 + TR@10 + IR@1 + IR@10; the choice is written to choices/ before the test split is asked, once. Headroom is what a row
recovers between the best trivial row and the oracle. Its interval resamples the test pictures, once for all seeds. Beside it
stands the same of val and test pictures together: twice the pictures, and fair where val chose the same steps for all rows.

All of it through the stages, as recipes run them: killed and started again with the same --workspace, it does what is missing.
`--markdown` prints tables for the documentation.
"""

from __future__ import annotations

import argparse

import _figures
import _generated
from _form import Record, main
from _photographs import FAMILIES, ROWS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument("--seeds", type=int, default=3, help="how many worlds, or draws of the photographs")
    parser.add_argument("--workspace", default="", help="keep the workspaces here (and continue them)")
    parser.add_argument("--execution", default="inline", help="ray or inline")
    parser.add_argument(
        "--jobs", type=int, default=1, help="seeds run at a time, inline, a thread or more each"
    )
    parser.add_argument("--markdown", action="store_true", help="also print the tables as Markdown")
    real = parser.add_argument_group("real photographs")
    real.add_argument("--data", default="", metavar="DIR", help="folder with clean/: the honest table")
    real.add_argument("--family", default="blip", choices=list(FAMILIES), help="judge and retrained models")
    real.add_argument("--human", type=float, default=0.2, help="share of human images (default 0.2)")
    real.add_argument("--wrong", type=float, default=0.6, help="web images with another's text (default 0.6)")
    real.add_argument("--truncated", type=float, default=0.0, help="web images with a cut text (default 0)")
    real.add_argument("--file-name", type=float, default=0.0, help="web images with a file name (default 0)")
    real.add_argument("--rows", nargs="+", default=[], choices=list(ROWS), help="which rows; default: all")
    real.add_argument(
        "--grid", nargs="+", default=[], metavar="STEPS:RATE", help="steps and learning rates to choose from"
    )


def measure(args: argparse.Namespace, record: Record) -> None:
    """The table that was asked for."""
    (_figures if args.data else _generated).measure(args, record)


if __name__ == "__main__":
    main(__doc__, measure, add_arguments)
