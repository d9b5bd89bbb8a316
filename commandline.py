"""How every script begins: torch's idle threads wait briefly, which torch reads once when it is loaded; an error of the
command line is one line, and how it is used stands in --help alone. Needs the standard library alone."""
import argparse
import os
from collections.abc import Iterable
from typing import NoReturn

SPIN = 3000  # rounds, 75 us on a Zen 4: 30,000 gain 8 to 20% on an idle machine and cost 5 times on a busy one


def spin_briefly() -> None:
    """OpenMP's idle threads spin for SPIN rounds, then sleep, unless the user has said what they do. By default they
    spin for so long that every operator is late when another process keeps a core busy."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN))


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def refuse(given: argparse.Namespace, usual: argparse.Namespace, names: Iterable[str], why: str) -> None:
    """Raises ValueError with the reason for the first of these options that is not as usual."""
    for name in names:
        if getattr(given, name) != getattr(usual, name):
            raise ValueError(f"--{name.replace('_', '-')}: {why}")


def path_text(text: str) -> str:
    """The type of what names a file or folder: "", as of a shell's variable that is not set, names none."""
    if not text:
        raise argparse.ArgumentTypeError("wanted a path, got an empty text")
    return text
