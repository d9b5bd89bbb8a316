"""A command line whose errors are one line; how it is used stands in --help alone. Needs the standard library alone."""
import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")
