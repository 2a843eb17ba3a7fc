#!/usr/bin/env python
"""Swap attention inside a pretrained model: the command `attention-zoo swap`."""

from __future__ import annotations

import typer

from attention_zoo.cli import swap

if __name__ == "__main__":
    typer.run(swap)
