"""Every claim of the project, in the order of the floors. Each test has an oracle; SLOW=1 runs the slow ones.

    python -m pytest -q test_all.py
"""
import argparse
import ast
import base64
import collections
import concurrent.futures
import contextlib
import csv
import email.utils
import errno
import functools
import html.parser
import http.client
import inspect
import io
import ipaddress
import itertools
import json
import math
import multiprocessing
import operator
import os
import pickle
import random
import re
import resource
import runpy
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import unicodedata
import warnings
import wave
import urllib.parse
import xml.etree.ElementTree as ElementTree
import zlib
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Literal, get_args, get_origin

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch, which reads it once: for models this small two are slower

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import amounts
import attention
import audio
import augment
import baselines
import batcher
import bodies
import bench
import bench_long
import bench_peers
import bench_stream
import checkpoint
import commandline
import compare
import config
import corpora
import data
import decode
import decode_options
import downloads
import dry_run
import files
import funasr
import funasr_layers
import hotwords
import listen
import live
import manifests
import model
import monitor
import openai_forms
import outputs
import packed
import pictures
import plot
import punctuation
import ranks
import report
import rules
import sentences
import serve
import sessions
import settings
import sockets
import survival
import streaming
import streams
import tokenizer
import train
import transcribe
import vad
import web
from attention import (ConformerBlock, ConvolutionModule, FeedForward, MultiHeadAttention, PositionalEncoding,
                       TransformerBlock, attend, causal_mask, check_lens, check_shapes, convolve, key_mask,
                       padding_mask, sinusoids)
from checkpoint import build, read_checkpoint
from batcher import Batcher, Step
from monitor import Metrics
from model import Hypotheses, boundaries, cif, cross_entropy_sum, ctc_sum, glance, scale_weights
from pauses import Pauses, Segment, cut_at_pauses, find_cut, levels
from step import dev_losses, sampler_order, split as split_batch
from pieces import (PIECE, PieceTokenizer, SpelledWord, UNSPOKEN, _is_han, _kind, are_spaced, merge_letters,
                    spell_words, write_sentence)
from tokenizer import (BLANK, Counts, EOS, SOS, SPECIALS, Tokenizer, UNK, align, char_errors, count_errors,
                       format_alignment, normalise_text, spoken_places, token_accuracy, word_errors)

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / "shared"
KIT = SHARED / "funasr_kit"
needs_kit = pytest.mark.skipif(not KIT.is_dir(), reason="../shared/funasr_kit is not here")  # for cases of its files
needs_digits = pytest.mark.skipif(not (SHARED / "speech/digits").is_dir(), reason="../shared/speech/digits is not here")
slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="takes minutes; set SLOW=1")

# ---- shared by the sections below ----

PATIENCE = 120.0  # s for what must happen, on a machine however slow and loaded

def wait_until(holds) -> None:
    """Until holds() is true; fails after PATIENCE."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, f"not within {PATIENCE} s"
        time.sleep(0.01)

def kit(*parts: str) -> Path:
    """A file or folder of FunASR's kits; the test that asks for it is skipped where they are not."""
    if not KIT.is_dir():
        pytest.skip("../shared/funasr_kit is not here")
    return KIT.joinpath(*parts)

def message_of(call, *args, **kwargs) -> str:
    """Of the ValueError that a call raises."""
    with pytest.raises(ValueError) as error:
        call(*args, **kwargs)
    return str(error.value)

def refused(words: str, call, *args, **kwargs) -> None:
    """A call raises a ValueError with these words, which are a pattern."""
    assert re.search(words, message_of(call, *args, **kwargs))

def refusal(capsys, *arguments, script=decode) -> str:
    """The one line with which a script refuses its arguments, before it prints anything."""
    device = ["--device=cpu"] * (script is decode)
    code = script.main([*device, *map(str, arguments)])
    shown, error = capsys.readouterr()
    assert (code, shown) == (2, "") and re.fullmatch(rf"{script.__name__}\.py: .+\n", error)
    return error

@functools.cache
def kit_system(variant: str) -> checkpoint.System:
    """Of a test that changes nothing in it."""
    return checkpoint.load_system(kit(variant), "cpu")

@functools.cache
def kit_vad() -> vad.Vad:
    return vad.load_vad(str(kit("vad")))

def kit_results(variant: str, path: str = "expected/results.json") -> dict:
    """What FunASR gave for a kit."""
    return json.loads(kit(variant, path).read_text(encoding="utf-8"))

@pytest.fixture(autouse=True)
def process_wide_settings():
    """What a command that a test runs may set is put back: signal handlers, the switch interval, torch's threads."""
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD
    handlers = {number: signal.getsignal(number) for number in numbers}
    interval, threads = sys.getswitchinterval(), torch.get_num_threads()
    yield
    signal.set_wakeup_fd(-1)
    sys.setswitchinterval(interval)
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)

# ---- config: YAML ----

ISSUE_FILE = '''model:
  name: "paraformer"
  encoder:
    num_layers: 6
    hidden_dim: 512
    num_heads: 8
    dropout: 0.1
  predictor:
    hidden_dim: 256
    num_layers: 2
  decoder:
    num_layers: 6
    hidden_dim: 512
    num_heads: 8
    dropout: 0.1

training:
  batch_size: 16
  learning_rate: 1e-4
  num_epochs: 100
  max_grad_norm: 1.0
  warmup_steps: 1000
'''
SAMPLES = [ISSUE_FILE, config.dump(config.Config()), '''a: 1
b:
- x
- 'y z'
- - 1
  - 2
-
- k: v
  m: [1, 2.5, a b, [c, ], "d, e"]
c:
    d: "q\\n\\u00e9"   # a comment
    'e' :
f#g: it's:here#too
''']
FRAGMENTS = ["- ", "  ", "\n", "a: ", "b:", "\n  - ", "[1, ", "]", "'", "\"", " # c", " #", "---", "...", "1e-4",
    "010", "0x1f", "1:30", "2020-01-01", "yes", "On", "null", "~", ".inf", "-.5", "1.", "\\n", "''", "<<: ", "= ",
    " : ", "? ", "\r\n", "\r", "\t", "{}", "1_0", "&a ", "*a", "!!str ", "|", ">", "%", "@", "\u2028", "\ufeff", "é",
    "7", "-", "+", "."]

def same_value(ours, theirs) -> bool:
    """Equal in value and type; PyYAML takes 1e-4 for text, which is the one difference that is wanted."""
    if isinstance(ours, float) and isinstance(theirs, str):
        return re.fullmatch(r"[-+.0-9]+[eE][-+0-9]+", theirs) is not None and float(theirs) == ours
    if type(ours) is not type(theirs):
        return False
    if isinstance(ours, dict):
        return list(ours) == list(theirs) and all(same_value(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(same_value, ours, theirs))
    return ours == theirs

SCALARS = [("0", 0), ("-17", -17), ("+3", 3), ("2.50", 2.5), (".5", 0.5), ("1.", 1.0), ("-0.25", -0.25),
    ("1.5e+3", 1500.0), ("true", True), ("True", True), ("TRUE", True), ("false", False), ("False", False),
    ("FALSE", False), ("null", None), ("Null", None), ("NULL", None), ("~", None), ("abc", "abc"), ("it's", "it's"),
    ("a  b", "a  b"), ("x:y", "x:y"), ("a#b", "a#b"), ("-x", "-x"), ("é中", "é中"), ("''", ""),
    ("'a''b # c: d'", "a'b # c: d"), ('"true"', "true"),
    (r'"\n\t\x41\u00e9\U0001f600 \" \\ /"', '\n\tA\u00e9\U0001f600 " \\ /'), ("y.z/w-1", "y.z/w-1")]

def random_block(rng, depth: int, is_map: bool) -> tuple[list[str], dict | list]:
    """Lines of a random document in the subset, in a random style, and the value that was planted in them."""
    lines, pairs = [], []
    for n in range(rng.randint(1, 4)):
        (text, value), below = rng.choice(SCALARS), []
        if rng.random() < 0.2:
            items = [rng.choice(SCALARS) for _ in range(rng.randint(0, 3))]
            text, value = f"[{', '.join(t for t, _ in items)}]", [v for _, v in items]
        elif depth and rng.random() < 0.5:
            inner_map = rng.random() < 0.5
            inner, value = random_block(rng, depth - 1, inner_map)
            indent = rng.randint(0 if is_map and not inner_map else 1, 4)
            text, below = "", [" " * indent + line for line in inner]
            if not is_map and rng.random() < 0.5:    # "- - a" and "- k: v" on one line
                text, below = inner[0], ["  " + line for line in inner[1:]]
        key = rng.choice(["k", "long key ", "'q: '", '"é"', "a-b"])
        head = f"{key[:-1]}{n}{key[-1]}" if is_map else "-"
        comment = rng.choice(["", "", "   # it's: [\"", "  "])
        lines += [f"{head}{':' * is_map} {text}".rstrip() + comment, *rng.choice([[], ["", " # note"]]), *below]
        pairs.append((head.strip(" '\""), value))
    return lines, dict(pairs) if is_map else [value for _, value in pairs]

def test_yaml_reads_planted_values_as_pyyaml_does():
    yaml, rng = pytest.importorskip("yaml"), random.Random(0)
    for _ in range(300):
        lines, planted = random_block(rng, 3, True)
        text = rng.choice(["\n", "\r\n"]).join(lines)
        assert same_value(config.parse_yaml(text), planted), text
        assert same_value(planted, yaml.safe_load(text)), text

def test_yaml_reads_funasrs_configs_as_pyyaml_does():
    yaml = pytest.importorskip("yaml")
    for path in kit().glob("*/config.yaml"):
        assert same_value(config.parse_yaml(path.read_text(), path.name), yaml.safe_load(path.read_text())), path

def test_yaml_mutations_give_pyyamls_value_or_name_the_line():  # C26
    yaml, rng, read = pytest.importorskip("yaml"), random.Random(0), 0
    for _ in range(3000):
        text = rng.choice(SAMPLES)[:rng.choice([40, 120])] + "\n"
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(text))
            text = text[:at] + rng.choice(FRAGMENTS) + text[at + rng.randint(0, 3):]
        try:
            ours = config.parse_yaml(text, "f.yaml")
        except ValueError as error:
            assert re.fullmatch(r"f\.yaml:[0-9]+: .+", str(error)), text
            continue
        read += 1
        assert same_value(ours, yaml.safe_load(text)), text
    assert read > 500

@pytest.mark.parametrize("text, line", [
    ("", 1), ("# only a comment", 1), ("a: 1\na: 2", 2), ("a:\n  b: 1\n c: 2", 3), ("a: 1\n  b: 2", 2),
    ("a: x\n  y", 2), ("a:\n\tb: 1", 2), ("a: &x 1", 1), ("a: *x", 1), ("a: !!str 1", 1), ("a: |\n  text", 1),
    ("a: >\n  text", 1), ("a: 1\n---\nb: 2", 2), ("%YAML 1.1\na: 1", 1), ("a: {b: 1}", 1), ("a: {}b", 1),
    ("a: [1,\n 2]", 1), ("a: 'x\n  y'", 1), ("? a\n: b", 1), ("<<: 1", 1), ("a: =", 1), ("1: a", 1), ("true: a", 1),
    ("- a", 1), ("a: b: c", 1), ("a: 'b'c", 1), ("a: [b", 1), ("a: [b] c", 1), ("a: [,]", 1),
    ("a: - b", 1), (r'a: "\q"', 1), (r'a: "\U00110000"', 1), ("a: \x00", 1), ("a: 1\rb: 2", 1), ("a: yes", 1),
    ("a: Off", 1), ("a: 010", 1), ("a: 0x1f", 1), ("a: 0b1", 1), ("a: 0o7", 1), ("a: 1:30", 1), ("a: 1_000", 1),
    ("a: 2020-01-01", 1), ("a: .inf", 1), ("a: -.NaN", 1), ("a: -.5", 1), ("a: 1e999", 1), ("a: 1" + "0" * 9999, 1),
    ("a: " + "[" * 21 + "]" * 21, 1), ("a:\n  " + "- " * 9999, 1), ("# a list\n\n- a", 3), ("# no colon\nmodel", 2),
    ("a:\n  b\n  c: 1", 2), ("a:\n  b: yes\n c: 1", 2), ("a: 1\n- b", 2), ("a:\n  - b\n - c", 3)])
def test_yaml_outside_the_subset_names_its_line(text, line):  # C26
    refused(rf"\Af\.yaml:{line}: wanted [^\n]+\Z", config.parse_yaml, text, "f.yaml")

@pytest.mark.parametrize("text, value", [("1e-4", 0.0001), ("1E5", 1e5), ("-2.5e3", -2500.0), ("+1.e2", 100.0)])
def test_yaml_exponents_make_floats(text, value):  # C26
    assert config.parse_yaml(f"a: {text}\nb: [{text}]") == {"a": value, "b": [value]}

# ---- config: load, dump ----

def written(tmp_path, text: str) -> str:
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    return str(tmp_path / "a.yaml")

def config_refusal(path: str, overrides: tuple | list = ()) -> str:
    return message_of(rules.load, path, overrides)

def leaves(section, path=()):
    for f in fields(section):
        value = getattr(section, f.name)
        yield from leaves(value, (*path, f.name)) if is_dataclass(value) else [((*path, f.name), value)]

def random_config(rng, section):
    def draw(value):
        if is_dataclass(value):
            return random_config(rng, value)
        if isinstance(value, tuple):
            return tuple(draw(rng.choice(value or (0.5,))) for _ in range(rng.randint(0, 3)))
        if isinstance(value, str):
            return "".join(rng.choices("ab1e \t\n\r\0'\"\\:#[]{},-é中\x85\u2028\ufeff\ud800😀", k=rng.randint(0, 8)))
        if isinstance(value, bool):
            return rng.random() < 0.5
        whole = isinstance(value, int)
        return rng.getrandbits(70) - 2**69 if whole else rng.uniform(-1, 1) * 10.0 ** rng.randint(-300, 300)
    return replace(section, **{f.name: rng.choice(get_args(f.type)) if get_origin(f.type) is Literal
                               else draw(getattr(section, f.name)) for f in fields(section)})

def test_issue_file_loads_word_for_word(tmp_path):
    loaded = rules.load(written(tmp_path, ISSUE_FILE))
    model, training = loaded.model, loaded.training
    assert (model.name, model.predictor.hidden_dim, model.predictor.num_layers) == ("paraformer", 256, 2)
    for part in (model.encoder, model.decoder):
        assert (part.num_layers, part.hidden_dim, part.num_heads, part.dropout) == (6, 512, 8, 0.1)
    assert (training.batch_size, training.num_epochs, training.warmup_steps) == (16, 100, 1000)
    assert (training.learning_rate, training.max_grad_norm) == (0.0001, 1.0)
    assert (HERE / "configs" / "paraformer.yaml").read_text().startswith(ISSUE_FILE)

@pytest.mark.parametrize("path", sorted((HERE / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_load(path):
    assert rules.load(str(path)).model.name == config.parse_yaml(path.read_text())["model"]["name"]

def test_dump_then_parse_gives_the_same_config_to_the_last_bit():  # C27
    rng = random.Random(0)
    for _ in range(100):
        drawn = random_config(rng, config.Config())
        for values in (asdict(drawn), config.parse_yaml(config.dump(drawn))):
            assert repr(config.from_dict(values, "x")) == repr(drawn)
    values = {"a": {"b": {}, "c": [1, [0.5, "x: y"]], "d": {"e": None, "f": True}}, "g": 1e-9, "h": ""}
    assert config.parse_yaml(config.dump_yaml(values)) == values

def test_dump_then_load_gives_the_same_config_and_pyyaml_agrees(tmp_path):
    data = {"kind": "manifest", "train": " a: #'\"\\\n\u2028é😀", "dev": "null", "augment": {"speeds": [0.9, 1, 1.1]}}
    odd = config.from_dict({"data": data, "training": {"learning_rate": 1e-5, "weight_decay": 1e22}}, "test")
    path = written(tmp_path, config.dump(odd))
    assert rules.load(path) == odd
    yaml = pytest.importorskip("yaml")
    assert config.from_dict(yaml.safe_load(Path(path).read_text(encoding="utf-8")), "x") == odd

def test_no_default_changes_unnoticed():
    """A config that leaves a field out would mean something else; where that is meant, the new number belongs here."""
    assert zlib.crc32(config.dump(config.Config()).encode()) == 3572777520

def test_overrides_do_what_editing_the_file_does(tmp_path):  # C27
    edited = ISSUE_FILE.replace("batch_size: 16", "batch_size: 8").replace("dropout: 0.1", "dropout: 0", 1)
    edited += "data:\n  kind: manifest\n  dev: b\n  augment:\n    speeds:\n    - 0.9\n    - 1\n  train: 'a=b'\n"
    wanted = rules.load(written(tmp_path, edited))
    overrides = ["--data.kind=manifest", "--data.dev=b", "--training.batch_size=8", "--model.encoder.dropout=0",
                 "--data.augment.speeds=[0.9, 1]"]
    assert rules.load(written(tmp_path, ISSUE_FILE), [*overrides, "--data.train=a=b"]) == wanted
    assert wanted.data.augment.speeds == (0.9, 1.0) and repr(wanted.model.encoder.dropout) == "0.0"

@pytest.mark.parametrize("old, new, message", [
    ("  batch_size: 16", "  batch_size: big", "18: training.batch_size: wanted int, got 'big'"),
    ("  batch_size: 16", "  batch_size: 16.0", "18: training.batch_size: wanted int, got 16.0"),
    ("  batch_size: 16", "  batch_size: true", "18: training.batch_size: wanted int, got true"),
    ("  batch_size: 16", "  batch_size:", "18: training.batch_size: wanted int, got null"),
    ("  batch_size: 16", "  batch_size: [1]", "18: training.batch_size: wanted int, got [1]"),
    ("learning_rate: 1e-4", "learning_rate: '1e-4'", "19: training.learning_rate: wanted float, got '1e-4'"),
    ("max_grad_norm: 1.0", "max_grad_norm: true", "21: training.max_grad_norm: wanted float, got true"),
    ('name: "paraformer"', "name: 3", "2: model.name: wanted str, got 3"),
    ("  encoder:", "  encoder:\n    kind: conformr",
     "4: model.encoder.kind: wanted transformer | conformer | sanm | relative_conformer, got 'conformr'"),
    ("  encoder:", "  encoder:\n    subsampling: 3", "4: model.encoder.subsampling: wanted 1 | 2 | 4, got 3"),
    ("  encoder:", "  encoder:\n    subsampling: true", "4: model.encoder.subsampling: wanted 1 | 2 | 4, got true"),
    ("  batch_size: 16", "  batchsize: 16",
     "18: unknown key 'training.batchsize' (did you mean 'training.batch_size'?)"),
    ("  batch_size: 16", "  dropout: 0.2",
     "18: unknown key 'training.dropout' (did you mean 'model.encoder.dropout'?)"),
    ("    num_heads: 8", "    num_head: 8",
     "6: unknown key 'model.encoder.num_head' (did you mean 'model.encoder.num_heads'?)"),
    ("training:\n", "trainin:\n", "17: unknown key 'trainin' (did you mean 'training'?)"),
    ("training:\n", "training: 3\ndata:\n", "17: training: wanted a section (key: value lines), got 3"),
    ("training:\n", "data:\n  augment:\n    speeds: [1, x]\ntraining:\n",
     "19: data.augment.speeds: wanted a list of float, got [1, 'x']"),
    ("training:\n", "data:\n  augment:\n    speeds: 1.0\ntraining:\n",
     "19: data.augment.speeds: wanted a list of float, got 1.0")])
def test_wrong_keys_and_types_name_the_line_and_what_was_wanted(tmp_path, old, new, message):
    path = written(tmp_path, ISSUE_FILE.replace(old, new, 1))
    assert config_refusal(path) == f"{path}:{message}"

@pytest.mark.parametrize("override, message", [
    ("--training.batch_size=big", "training.batch_size: wanted int, got 'big'"),
    ("--training.lr=1", "unknown key 'training.lr' (did you mean 'training.learning_rate'?)"),
    ("--model=3", "model: wanted a section"),
    ("--model.name.x=3", "model.name: wanted str, got {'x': 3}"), ("--training.seed", "wanted --section.key=value"),
    ("training.seed=1", "wanted --section.key=value"), ("--training.seed=yes", "wanted true, false, a plain decimal"),
    ("--data.train=a\tb", "wanted printable text and spaces, got a tab"), ("--=3", "wanted --section.key"),
    ("--training.=3", "unknown key")])
def test_wrong_overrides_name_themselves(tmp_path, override, message):
    error = config_refusal(written(tmp_path, ISSUE_FILE), [override])
    assert error.startswith(f"{override}: {message}") and "\n" not in error

def test_unreadable_files_are_one_line_that_names_the_path(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"model:\n  name: \xe9\n")
    for name, got in (("none.yaml", "No such file or directory"), ("", "Is a directory"), ("latin.yaml", "'utf-8' .+")):
        path = str(tmp_path / name)
        assert re.fullmatch(rf"{re.escape(path)}: wanted a config in YAML \(UTF-8\), got {got}", config_refusal(path))

# ---- rules: what a config must keep ----

BROKEN = {  # override -> the line that it adds to the one error
    "--model.encoder.num_heads=7": "model.encoder.num_heads: wanted a divisor of hidden_dim 512, got 7",
    "--model.decoder.hidden_dim=100": "model.decoder.num_heads: wanted a divisor of hidden_dim 100, got 8",
    "--model.predictor.num_layers=0": "model.predictor.num_layers: wanted 1 or more, got 0",
    "--model.encoder.num_layers=-1": "model.encoder.num_layers: wanted 0 or more, got -1",
    "--model.encoder.ffn_dim=2147483648": "model.encoder.ffn_dim: wanted below 2^31, got 2147483648",
    "--training.seed=18446744073709551616": "training.seed: wanted at least 0 and below 2^64, got 18446744073709551616",
    "--data.toy.max_symbols=2": "data.toy.max_symbols: wanted at least min_symbols 3, got 2",
    "--data.toy.max_frames=17": "data.toy.max_frames: wanted at least 3 x min_frames 6, got 17",
    "--data.toy.blend_frames=7": "data.toy.blend_frames: wanted at most min_frames 6, got 7",
    "--data.max_sec=0.05": "data.max_sec: wanted at least min_sec 0.1, got 0.05",
    "--data.augment.freq_width=81": "data.augment.freq_width: wanted at most num_mels 80, got 81",
    "--data.kind=manifest": "data.train: wanted a manifest or a Kaldi folder, as data.kind is manifest, got ''"}

@pytest.mark.parametrize("choice, override, default", [
    ("name=transformer", "predictor.num_layers=3", "2"), ("name=transformer", "sampling_ratio=0.25", "0.5"),
    ("name=transformer", "decoder.kind=bare", "'transformer'"), ("name=transformer", "end_token=true", "false"),
    ("name=ctc", "decoder.num_heads=2", "4"), ("name=ctc", "ctc_weight=0.5", "0.3"),
    ("encoder.kind=transformer", "encoder.kernel_size=3", "15"),
    ("encoder.kind=conformer", "encoder.memory_shift=1", "0"),
    ("encoder.kind=sanm", "encoder.position=none", "'sinusoidal'"), ("encoder.kind=sanm", "encoder.context=3", "0"),
    ("name=paraformer", "chunk.new=4", "10"), ("predictor.kind=stacked", "predictor.upsampling=3", "0"),
    ("predictor.kind=stacked", "predictor.smooth=2", "1.0"), ("predictor.kind=dense", "predictor.num_layers=1", "2"),
    ("predictor.kind=depthwise", "predictor.upsampling=3", "0"),
    ("predictor.upsampling=0", "predictor.timing_smooth=1", "0.25"),
    ("decoder.kind=transformer", "decoder.kernel_size=5", "11"),
    ("decoder.kind=bare", "decoder.position=none", "'sinusoidal'"),
    ("decoder.kind=sanm", "decoder.position=none", "'sinusoidal'")])
def test_an_option_that_nothing_uses_must_have_its_default(tmp_path, choice, override, default):  # C68
    path, (option, _), why = written(tmp_path, "model: {}"), override.split("="), choice.replace("=", " ")
    _, error = config_refusal(path, [f"--model.{choice}", f"--model.{override}"]).split("\n  ")
    assert error.startswith(f"model.{option}: wanted its default {default}, as model.{why} has no use for it, got ")
    rules.load(path, [f"--model.{choice}", f"--model.{option}={default}"])

@pytest.mark.parametrize("switch, unused", [
    ("model.name=transformer", "model.predictor.hidden_dim=12"), ("model.name=ctc", "model.decoder.num_heads=2"),
    ("model.encoder.kind=transformer", "model.encoder.kernel_size=9"),
    ("model.predictor.kind=dense", "model.predictor.hidden_dim=12"),
    ("model.decoder.kind=bare", "model.decoder.kernel_size=9")])
def test_who_switches_a_kind_on_the_command_line_need_not_undo_what_the_file_says_for_its_own(tmp_path, switch, unused):
    """configs/toy.yaml has numbers that each of these has no use for; one that is typed is refused as before."""
    toy = str(HERE / "configs/toy.yaml")
    found = rules.load(toy, [f"--{switch}"])
    assert rules.load(written(tmp_path, config.dump(found))) == found
    assert f"  {unused.split('=')[0]}: wanted its default " in config_refusal(toy, [f"--{switch}", f"--{unused}"])
    path = written(tmp_path, "data:\n  unit: word\n")
    for overrides in ([], [f"--{switch}"]):     # nor one that another choice has no use for
        assert "\n  data.unit: wanted its default 'char', as data.kind toy" in config_refusal(path, overrides)

def test_a_switch_that_switches_another_choice_back_resets_what_that_one_uses(tmp_path):
    text = "model:\n  predictor:\n    kind: dense\n    upsampling: 3\n    timing_smooth: 1.0\ndata:\n  kind: manifest\n"
    path = written(tmp_path, text + "  train: a\n  dev: b\n  augment:\n    reverb: c\n    reverb_share: 0.25\n")
    assert rules.load(path, ["--model.predictor.kind=stacked", "--data.kind=toy"]) == config.Config()

def test_options_that_the_compared_models_use_are_theirs_to_set(tmp_path):
    for name, used in (("transformer", ("decoder.num_heads=2", "ctc_weight=0.5")), ("ctc", ("encoder.num_heads=2",))):
        rules.load(written(tmp_path, f"model:\n  name: {name}\n"), [f"--model.{option}" for option in used])

def test_check_lists_every_violation_in_one_error(tmp_path):  # C27
    path = written(tmp_path, ISSUE_FILE)
    for override, line in BROKEN.items():
        error = config_refusal(path, [override])
        assert error.split("\n  ")[1] == line and error.startswith(f"{path} {override}: wanted")
    dev = "data.dev: wanted a manifest or a Kaldi folder, as data.kind is manifest, got ''"
    assert sorted(config_refusal(path, list(BROKEN)).split("\n  ")[1:]) == sorted([*BROKEN.values(), dev])

def as_flags(text: str) -> list[str]:
    return [f"--{option}" for option in text.split()]

MANIFESTS = "data.kind=manifest data.train=a data.dev=b"
RELATIVE = "model.encoder.kind=relative_conformer model.encoder.subsampling=4"
SANM, ODD = "model.encoder.kind=sanm", "model.encoder.hidden_dim=511 model.encoder.num_heads=1"
STREAMS = f"model.name=streaming {SANM} model.decoder.kind=sanm model.predictor.kind=dense"
SEACO = "model.name=seaco model.hotwords.decoder.num_layers="
NO_HEAD = "model.predictor.kind: wanted dense or depthwise without a timing head for a streaming model"
SIX = "wanted 6 or more: the sixth layer's attention chooses from a long list"
SINUSOIDS = "hidden_dim: wanted an even width for sinusoids, got 511"

@pytest.mark.parametrize("given", [
    f"{MANIFESTS} data.augment.snr_db=[-100,100]", f"{MANIFESTS} data.augment.snr_db=[5,5] data.augment.noise=a",
    "training.batch_frames=2147483647", f"{MANIFESTS} data.augment.speeds=[0.9,1]",
    f"{MANIFESTS} {SANM} model.encoder.memory_shift=7",
    "data.toy.min_symbols=5 data.toy.max_symbols=5 data.toy.blend_frames=6 data.toy.max_frames=18 data.max_sec=0.1",
    "data.augment.freq_width=80", "model.decoder.kind=sanm model.decoder.attention_layers=6",
    "model.decoder.hidden_dim=256", f"{MANIFESTS} {SANM} data.num_mels=4", f"{RELATIVE} data.num_mels=7",
    "model.predictor.kind=dense model.predictor.smooth=1.25 model.predictor.noise=0.25",
    f"{STREAMS} model.chunk.encoder_look_back=-1 model.chunk.old=3",
    "model.encoder.num_layers=1 model.predictor.num_layers=1 model.decoder.num_layers=0", f"{SEACO}6", f"{ODD} {SANM}",
    f"{ODD} model.encoder.position=none",
    "model.decoder.hidden_dim=511 model.decoder.num_heads=1 model.decoder.position=none",
    "data.kind=manifest data.train=a training.init_from=a", f"{MANIFESTS} {SANM} data.num_mels=2 data.lfr_m=2"])
def test_what_just_keeps_a_rule_between_sections_is_taken(tmp_path, given):  # C27
    assert rules.load(written(tmp_path, ISSUE_FILE), as_flags(given))

@pytest.mark.parametrize("given, wanted", [
    ("data.augment.speeds=[0.9,1]",
     "data.augment.speeds: wanted its default [1.0], as data.kind toy has no use for it, got [0.9, 1.0]"),
    ("data.unit=word", "data.unit: wanted its default 'char', as data.kind toy has no use for it, got 'word'"),
    ("data.augment.snr_db=[5,20]",
     "data.augment.snr_db: wanted its default [], as data.kind toy has no use for it, got [5.0, 20.0]"),
    *((f"{MANIFESTS} data.augment.snr_db={given.replace(' ', '')}",
       f"data.augment.snr_db: wanted [] or two numbers from -100 to 100, the lower first, got {given}")
      for given in ("[5.0]", "[5.0, 4.9]", "[-100.1, 5.0]", "[5.0, 100.1]")),
    ("model.encoder.num_heads=0", "1 or more"), ("model.encoder.num_layers=0", "1 or more"),
    (f"{SANM} model.encoder.memory_shift=8", "at most half of kernel_size 15"),
    ("model.decoder.kind=sanm model.decoder.attention_layers=7", "at most num_layers 6"),
    ("model.decoder.kind=bare model.decoder.hidden_dim=256", "the encoder's 512 for kind bare"),
    ("model.share_embedding=true model.decoder.hidden_dim=256", "the encoder's 512 for share_embedding"),
    *((f"{SANM} data.num_mels={given}", "a product with lfr_m 1 that is even and 4 or more for kind sanm")
      for given in (2, 79)),
    (f"{RELATIVE} data.num_mels=6", "a product with lfr_m 1 that is 7 or more for kind relative_conformer"),
    (f"{RELATIVE} model.encoder.num_heads=1 model.encoder.hidden_dim=33", "an even width for sinusoids"),
    ("model.predictor.kind=depthwise model.predictor.noise=0.2 model.predictor.smooth=1.25",
     "at most 1 + noise 0.2, as weights are at most 1"),
    (f"{STREAMS} model.chunk.ahead=0", "1 or more"), (f"{STREAMS} model.chunk.decoder_look_back=-2", "-1 or more"),
    (f"{STREAMS} training.picture_epochs=1", "0 for a streaming model, whose windows overlap"),
    (f"{SANM} model.encoder.subsampling=2", "1 for kind sanm"),
    (f"{RELATIVE} model.encoder.subsampling=2", "4 for kind relative_conformer"),
    ("model.decoder.kind=sanm model.decoder.num_layers=0", "1 or more"),
    ("model.name=transformer model.decoder.num_layers=0", "1 or more"),
    (STREAMS.replace(SANM, ""), "model.encoder.kind: wanted sanm for a streaming model, got 'transformer'"),
    (STREAMS.replace("model.decoder.kind=sanm", ""),
     "model.decoder.kind: wanted sanm for a streaming model, got 'transformer'"),
    (STREAMS.removesuffix("model.predictor.kind=dense"), f"{NO_HEAD}, got 'stacked'"),
    (f"{STREAMS} model.predictor.upsampling=3", f"{NO_HEAD}, got 'dense'"),
    (f"{SEACO}5", f"model.hotwords.decoder.attention_layers: {SIX}, got 0"),
    (f"{SEACO}6 model.hotwords.decoder.attention_layers=5", SIX.removeprefix("wanted ")),
    (ODD, f"model.encoder.{SINUSOIDS}"), (f"{ODD} {SANM} model.place_embedding=true", f"model.encoder.{SINUSOIDS}"),
    (ODD.replace("encoder", "decoder"), f"model.decoder.{SINUSOIDS}"),
    (f"{MANIFESTS} data.augment.noise=a",
     "data.augment.snr_db: wanted two numbers, how loud the recordings of data.augment.noise are, got []")])
def test_rules_between_sections_hold_at_their_bounds(tmp_path, given, wanted):  # C27
    """wanted: of the last option, whose value is told; or the whole line."""
    name, _, value = given.split()[-1].partition("=")
    line = wanted if ": wanted " in wanted else f"{name}: wanted {wanted}, got {value}"
    assert config_refusal(written(tmp_path, ISSUE_FILE), as_flags(given)).split("\n  ")[1:] == [line]

BOUNDS = {  # range -> a field that has it, values within, values outside
    "1 or more": ("training.batch_size", [1], [0]), "2 or more": ("model.mwer_samples", [2], [1]),
    "0 or more": ("data.toy.noise", [0], [-0.01, math.nan, math.inf]),
    "-1 or more": ("model.chunk.encoder_look_back", [-1], [-2]),
    "above 0": ("training.learning_rate", [1e-9], [0, math.nan, math.inf]),
    "at least 0 and below 1": ("model.encoder.dropout", [0, 0.999], [-0.01, 1, math.nan]),
    "between 0 and 1": ("model.sampling_ratio", [0, 1], [-0.01, 1.01, math.nan]),
    "from 0 to 0.2": ("training.warmup_share", [0, 0.2], [-0.01, 0.21, math.nan]),
    "from 0.1 to 10": ("data.augment.speeds", [[0.1, 10]], [[0.09], [1, 10.1], [math.nan], []]),
    "from 1 to 1000": ("data.num_mels", [1, 1000], [0, 1001]),
    "from 1000 to 1000000": ("data.sample_rate", [1000, 10**6], [999, 10**6 + 1]),
    "at least 0 and below 2^64": ("training.seed", [0, 2**64 - 1], [-1, 2**64]),
    "odd and above 0": ("model.predictor.kernel_size", [1, 3], [-1, 0, 2])}

@pytest.mark.parametrize("wanted", rules.RANGES)
def test_every_range_holds_at_its_bounds(wanted):  # C27
    field, inside, outside = BOUNDS[wanted]
    for value in [*inside, *outside]:
        errors = list(rules._value_errors(config.from_dict(config.nested(field, value), "test")))
        assert errors == ([] if value in inside else [(field, wanted)]), value

def test_every_field_has_a_comment_and_every_number_a_range():
    ranged = {name for _, names in rules.RANGES.values() for name in names.split()}
    assert ranged <= {path[-1] for path, _ in leaves(config.Config())}
    for path, value in leaves(config.Config()):
        numeric = isinstance(value[0] if isinstance(value, tuple) and value else value, (int, float))
        assert not numeric or isinstance(value, bool) or rules._range_of(path[-1]) or path[-1] == "subsampling", path
    for line in re.findall(r"^    \w+: (?:int|float|bool|str|tuple).*= .*", inspect.getsource(config), re.MULTILINE):
        assert re.search(r"  # \S", line), line

# ---- tokenizer: texts and ids ----

ODD = [*"\u0e33\u0eb3\u0edc\u0e4d\u0e32\u0e49\u00ad\u200b\ufeff\u200dİẞßΣςﬁＡｶﾞ①½´ÅK가각"
        "\u1100\u1161\u11a8\u0301\u0323\u0307\U0001d170\u00a0\u3000\u2028\x1c\t\n\ud800\udfff",
       "<unk>", "<blank>", " <eos> "]

def random_texts(seed, n):
    """n texts that mix ASCII, Chinese, characters that normalisation moves, and any code point at all."""
    rng = random.Random(seed)
    draws = (lambda: chr(rng.randrange(32, 127)), lambda: chr(rng.randrange(0x4e00, 0x9fff)), lambda: rng.choice(ODD),
             lambda: " ", lambda: chr(rng.randrange(0x110000)), lambda: chr(rng.randrange(0x300, 0x370)))
    return ["".join(rng.choice(draws)() for _ in range(rng.randrange(12))) for _ in range(n)]

@pytest.mark.parametrize("text, wanted", [
    ("  The\tCAT,\u3000it\n\nsat! ", "the cat, it sat!"), ("ＡＢＣ１２３", "abc123"), ("ﬁn", "fin"), ("e\u0301", "é"),
    ("STRASSE Straße", "strasse straße"), ("ΟΔΟΣ", "οδος"), ("你好，世界", "你好,世界"), ("\u00a0 ", ""),
    ("a\ud800b", "a\ufffdb"), ("\ufeffsoft\u00adly zero\u200bwidth \u200eleft\u200f \u2060 ", "softly zerowidth left"),
    ("น้ำ กำ", "น้ำ กำ"), ("\u0e01\u0e4d\u0e32", "\u0e01\u0e4d\u0e32"), ("ນ້ຳ ໜຶ່ງ ໝາ", "ນ້ຳ ໜຶ່ງ ໝາ"),
    ("می\u200cشود", "می\u200cشود"), ("Ａำ\u0301e\u0301", "aำ\u0301é"),
])
def test_normalise_text_gives_the_planted_form(text, wanted):  # C8
    assert normalise_text(text) == wanted

def test_normalise_text_is_idempotent_and_writable():  # C8
    texts = random_texts(0, 5000) + ["İ\U0001d170"]  # the last: NFKC then lower case once is not enough
    lowered_once = [unicodedata.normalize("NFKC", t).lower() for t in texts]
    assert unicodedata.normalize("NFKC", lowered_once[-1]) != lowered_once[-1]
    for once in map(normalise_text, texts):
        assert normalise_text(once) == once == once.encode("utf-8").decode("utf-8")
        assert once == once.strip() and "  " not in once and (not once or once.split(" ") == once.split())

@pytest.mark.parametrize("unit", ["char", "word"])
def test_decode_undoes_encode_and_files_keep_the_vocabulary(unit, tmp_path):  # C9
    texts = random_texts(1, 1500)
    tokenizer = Tokenizer.build(texts, unit=unit)
    assert tokenizer == Tokenizer.build(reversed(texts), unit=unit) and tokenizer.symbols[:4] == SPECIALS
    tokenizer.save(tmp_path / "tokens.json")
    torch.save(tokenizer.state(), tmp_path / "tokens.pt")
    loaded = Tokenizer.load(tmp_path / "tokens.json")
    assert loaded == tokenizer == Tokenizer.from_state(torch.load(tmp_path / "tokens.pt", weights_only=True))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tokens.json", "tokens.pt"]  # nothing temporary is left
    lossless = 0
    for text in texts:
        ids = loaded.encode(text)
        assert not {BLANK, SOS, EOS} & set(ids) and all(3 <= i < len(loaded) for i in ids)
        special_word = unit == "word" and set(SPECIALS) & set(normalise_text(text).split())
        assert (UNK in ids) == bool(special_word)
        if not special_word:
            wanted, tensor = normalise_text(text), torch.tensor(ids, dtype=torch.int64)
            assert loaded.decode([SOS, BLANK, *ids, EOS, BLANK]) == loaded.decode(tensor) == wanted
            lossless += 1
    assert lossless > 1000 and (unit == "word") == (lossless < len(texts))

@pytest.mark.parametrize("unit", ["char", "word"])
def test_a_vocabulary_of_before_still_loads_and_spells_what_it_spelled(unit):  # C8
    """Made when NFKC took U+0E33 apart and soft hyphens were symbols: no unknown ids in what it was made of."""
    text = "น้ำ กำ"
    older = unicodedata.normalize("NFKC", text)
    symbols = sorted({"\u00ad", *older} if unit == "char" else {"a\u00adb", *older.split()})
    old = Tokenizer.from_state({"unit": unit, "symbols": [*SPECIALS, *symbols]})
    assert (old.decode(old.encode(text)) == old.decode(old.encode(older)) == older != text
            and UNK not in old.encode(text))
    assert old.unknown_units("กำ ๆ") == ["ๆ"] and old.encode("ๆ") == [UNK]
    assert Tokenizer("char", (*SPECIALS, older[-1])).encode("ำ") == [UNK]  # half of it is known
    new = Tokenizer.build([text], unit)
    assert new.decode(new.encode(text)) == text and char_errors(text, text).errors == 0

def test_planted_ids_counts_and_specials():  # C6
    char = Tokenizer.build(["B b", "b B"])
    assert char.state() == {"unit": "char", "symbols": ["<blank>", "<sos>", "<eos>", "<unk>", " ", "b"]}
    assert (BLANK, SOS, EOS, UNK, len(char)) == (0, 1, 2, 3, 6)
    assert char.encode("B x") == [5, 4, 3] and char.decode([1, 5, 4, 3, 0, 2]) == "b <unk>"
    word = Tokenizer.build(["The <blank> cat <EOS>"], unit="word")
    assert word.symbols == SPECIALS + ("cat", "the")
    assert word.encode("THE <blank> dog cat") == [5, UNK, UNK, 4] and word.decode([5, 3, 4, 2]) == "the <unk> cat"
    for ids in ([6], [-1]):
        refused(rf"ids must be in 0\.\.5, got {ids[0]}", word.decode, ids)

@pytest.mark.parametrize("text, message", [
    ("{oops", "got no JSON"), (b"\xff\xfe", "got 'utf-8' codec"), ("[1]", r"wanted \{'unit'.* got \[1\]"),
    ({"unit": "char"}, "wanted {'unit'"), ({"unit": "char", "symbols": "abc"}, "wanted {'unit'"),
    ({"unit": "bpe", "symbols": [*SPECIALS]}, "must be char or word, got 'bpe'"),
    ({"unit": "char", "symbols": ["<blank>", "a"]}, "must begin with .*'<unk>'.*got .'<blank>', 'a'"),
    ({"unit": "char", "symbols": [*SPECIALS, "a", "b", "a"]}, r"symbols\[6\] repeats symbols\[4\], 'a'"),
    ({"unit": "word", "symbols": [*SPECIALS, "<eos>"]}, r"symbols\[4\] repeats symbols\[2\], '<eos>'"),
    ({"unit": "char", "symbols": [*SPECIALS, "ab"]}, r"symbols\[4\] must be one normalised char, got 'ab'"),
    ({"unit": "char", "symbols": [*SPECIALS, "A"]}, r"symbols\[4\] must be one normalised char, got 'A'"),
    ({"unit": "word", "symbols": [*SPECIALS, "a b"]}, r"symbols\[4\] must be one normalised word, got 'a b'"),
    ({"unit": "word", "symbols": [*SPECIALS, " "]}, r"symbols\[4\] must be one normalised word, got ' '"),
    ({"unit": "char", "symbols": [*SPECIALS, 7]}, r"symbols\[4\] must be one normalised char, got 7"),
])
def test_a_bad_file_is_one_line_that_names_it(text, message, tmp_path):
    path = tmp_path / "bad.json"
    text = json.dumps(text) if isinstance(text, dict) else text
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.load(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)

def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "tokens.json"
    Tokenizer.build(["old"]).save(path)
    before = path.read_bytes()

    def fail(source, target):
        raise OSError("disk")
    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk"):
        Tokenizer.build(["newer"]).save(path)
    assert path.read_bytes() == before

# ---- tokenizer: alignment and error counts ----

def best_by_recursion(ref, hyp):
    """The oracle: (fewest edits, fewest substitutions among those), straight from the definition."""
    @functools.cache
    def best(i, j):
        if not i or not j:
            return i + j, 0
        change = ref[i - 1] != hyp[j - 1]
        ways = [(best(i - 1, j - 1), (change, change)), (best(i - 1, j), (1, 0)), (best(i, j - 1), (1, 0))]
        return min((edits + e, subs + s) for (edits, subs), (e, s) in ways)
    return best(len(ref), len(hyp))

def random_pairs(seed, n):
    rng = random.Random(seed)
    for _ in range(n):
        items = rng.sample(["a", "b", "cc", 0, 7, ("x", 1)], rng.randrange(1, 7))
        yield tuple([rng.choice(items) for _ in range(rng.randrange(13))] for _ in "rh")

def test_alignment_is_minimal_and_spells_both_sides():  # C10
    for ref, hyp in random_pairs(0, 1500):
        steps, counts = align(ref, hyp), count_errors(ref, hyp)
        assert [r for op, r, _ in steps if op != "ins"] == ref and [h for op, _, h in steps if op != "del"] == hyp
        assert all({"hit": r == h, "sub": r != h, "ins": r is None, "del": h is None}[op] for op, r, h in steps)
        assert (counts.errors, counts.sub) == best_by_recursion(ref, hyp) and counts.ref == len(ref)
        assert [op for op, _, _ in steps].count("ins") == counts.ins and counts.ins - counts.del_ == len(hyp) - len(ref)
        swapped = count_errors(hyp, ref)
        assert (swapped.sub, swapped.ins, swapped.del_) == (counts.sub, counts.del_, counts.ins)

def test_errors_are_counted_in_the_memory_of_a_row():
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcd", k=700)) for _ in range(2)]
    tracemalloc.start()
    counts = count_errors(*texts)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counts.errors > 200 and peak < 200_000  # all rows: 3.9 MB

def test_planted_edits_are_counted_as_planted():
    rng = random.Random(0)
    for _ in range(200):
        ref = list(range(40))  # all different and edits far apart: only one minimal alignment
        places = rng.sample(range(0, 40, 3), 9)
        hyp, total = [[x] for x in ref], rng.randrange(1, 4)
        for k, place in enumerate(places):
            hyp[place] = ([-1], [], [place, -2])[k % 3] if k < 3 * total else hyp[place]
        counts = count_errors(ref, [x for part in hyp for x in part])
        assert counts == Counts(sub=total, ins=total, del_=total, ref=40)
        assert {type(x) for x in vars(counts).values()} == {int}  # what JSON and a checkpoint can hold

def test_ties_keep_hits_and_are_settled_from_the_end():
    assert align("ab", "bc") == [("del", "a", None), ("hit", "b", "b"), ("ins", None, "c")]  # 2 edits, not 2 sub
    assert align("aa", "a") == [("del", "a", None), ("hit", "a", "a")]
    assert align("ab", "x") == [("del", "a", None), ("sub", "b", "x")]
    assert align([], []) == [] and align([], "a") == [("ins", None, "a")]

@pytest.mark.parametrize("ref, hyp, chars, words", [  # jiwer 4.0.0 on the normalised texts; 3,000 more had its totals
    ("The cat sat.", "a  CAT sat", Counts(sub=1, del_=3, ref=12), Counts(sub=2, ref=3)),
    ("ab cd", "abcd", Counts(del_=1, ref=5), Counts(sub=1, del_=1, ref=2)),
    ("今天天气", "今天气好", Counts(del_=1, ins=1, ref=4), Counts(sub=1, ref=1)),
    ("", "a b", Counts(ins=3), Counts(ins=2)),
    ("the cat sat", "the cats at on", Counts(ins=4, del_=1, ref=11), Counts(sub=2, ins=1, ref=3)),
    ("你好 世界", "你 好世", Counts(ins=1, del_=2, ref=5), Counts(sub=2, ref=2)),
    ("zero one", "one", Counts(del_=5, ref=8), Counts(del_=1, ref=2)),
])
def test_text_errors_count_normalised_characters_with_spaces_and_words(ref, hyp, chars, words):  # C10 C75
    assert (char_errors(ref, hyp), word_errors(ref, hyp)) == (chars, words)

def test_counts_add_and_divide_once():  # C11
    parts = [Counts(1, 2, 3, 10), Counts(ins=4), Counts(ref=10)]
    total = sum(parts, Counts())
    assert total == Counts(1, 6, 3, 20) and total.errors == 10 and total.rate == token_accuracy(total) == 0.5
    assert Counts().rate == 0.0 and token_accuracy(Counts()) == 1.0
    assert Counts(ins=4).rate == 4.0 and token_accuracy(Counts(ins=4)) == 0.0  # no reference: finite
    assert token_accuracy(count_errors([5, 6], [6])) == 0.5  # by alignment: position by position it would be 0

def test_format_alignment_is_the_planted_picture():
    assert format_alignment("the cat sat on".split(), "a cat on it".split()) == (
        "REF: the cat sat on ***\n"
        "HYP: a   cat *** on it\n"
        "OPS: S       D      I")
    # 今 takes two columns, the space ␣ one, the mark on q none
    assert format_alignment("今 天气q\u0301", "今天汽,q\u0301x") == (
        "REF: 今 ␣   天 *** 气 q \u0301 ***\n"
        "HYP: 今 *** 天 汽  ,  q \u0301 x\n"
        "OPS:    D      I   S     I")

def letters(text: str) -> list[int]:
    return [ord(c) - ord("a") for c in text]

def data_options(**changes) -> SimpleNamespace:
    toy = SimpleNamespace(num_train=20, num_dev=10, num_symbols=26, min_symbols=3, max_symbols=12, min_frames=6,
                          max_frames=20, blend_frames=2, noise=0.6, gain_std=0.5, tilt_std=0.5)
    augment = SimpleNamespace(speeds=(0.9, 1.0, 1.1), snr_db=(), channel_std=0.0, freq_masks=2, freq_width=5,
                              time_masks=2, time_width=4, time_share=0.2)
    return SimpleNamespace(**{**dict(kind="toy", sample_rate=8000, num_mels=20, lfr_m=2, lfr_n=2, min_sec=0.1,
                                     max_sec=2.0, toy=toy, augment=augment), **changes})

def tone(seconds: float, rate_hz: int, hz: float = 440.0) -> np.ndarray:
    return 0.3 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate_hz)) / rate_hz)

def write_manifest(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path

# ---- audio: wav ----

def wav(samples: np.ndarray | bytes, code: int = 1, bits: int = 16, channels: int = 1, rate_hz: int = 8000,
        extensible: bool = False, size: int | None = None, before: bytes = b"", after: bytes = b"",
        align: int | None = None, head: bytes = b"RIFF") -> bytes:
    """The bytes of a WAV file; size is what its data chunk says of itself, before and after are other chunks."""
    content = bytes(samples)
    block = channels * bits // 8 if align is None else align
    code_or_more, bytes_per_sec = 0xFFFE if extensible else code, rate_hz * block % 2**32
    fmt = struct.pack("<HHIIHH", code_or_more, channels, rate_hz, bytes_per_sec, block, bits)
    if extensible:
        fmt += struct.pack("<HHIH", 22, bits, 0, code) + b"\0\0\0\0\x10\0\x80\0\0\xaa\0\x38\x9b\x71"
    chunk = b"data" + struct.pack("<I", len(content) if size is None else size) + content
    return head + b"\xff\xff\xff\xffWAVE" + before + b"fmt " + struct.pack("<I", len(fmt)) + fmt + chunk + after

def encode_samples(values: list[int], code: int, bits: int) -> bytes:
    """Sixteenths of full scale -> bytes."""
    if code == 3:
        return struct.pack(f"<{len(values)}{'f' if bits == 32 else 'd'}", *[v / 16 for v in values])
    if bits == 8:
        return bytes(128 + v * 8 for v in values)
    return b"".join((v << (bits - 5)).to_bytes(bits // 8, "little", signed=True) for v in values)

@pytest.mark.parametrize("code,bits", [(1, 8), (1, 16), (1, 24), (1, 32), (3, 32), (3, 64)])
@pytest.mark.parametrize("channels,extensible", [(1, False), (2, True), (3, False), (8, True)])
def test_load_wav_gives_planted_samples_of_every_format(tmp_path, monkeypatch, code, bits, channels, extensible):  # C12
    monkeypatch.setenv("PATH", "")      # no ffmpeg
    values = [(7 * i * i + i) % 32 - 16 for i in range(channels * 9)]
    expected = np.reshape(values, (9, channels)).mean(1) / 16
    payload, odd = encode_samples(values, code, bits), b"JUNK\3\0\0\0abc\0"
    for size, after in [(None, b"LIST\4\0\0\0abcd"), (0, b""), (0xFFFFFFFF, b""), (len(payload) + 99, b"")]:
        blob = wav(payload, code, bits, channels, 44100, extensible, size, odd, after)
        (tmp_path / "a.wav").write_bytes(blob)
        for source in (blob, tmp_path / "a.wav", str(tmp_path / "a.wav")):
            samples, rate_hz = audio.load_wav(source)
            assert rate_hz == 44100 and samples.dtype == torch.float32
            np.testing.assert_allclose(samples.numpy(), expected, atol=1e-7, rtol=0)
        assert audio.audio_seconds(tmp_path / "a.wav") == 9 / 44100

def test_24_bits_may_lie_in_4_bytes_and_an_align_that_contradicts_is_refused():  # C12
    values = [-8, 7, 0, -16, 15, 3]
    packed = encode_samples(values, 1, 24)
    wide = b"".join((v << 19).to_bytes(4, "little", signed=True) for v in values)
    for blob in [wav(packed, 1, 24, 2, align=align) for align in (6, 0, 1)] + [wav(wide, 1, 24, 2, align=8)]:
        assert audio.load_wav(blob)[0].tolist() == [-0.5 / 16, -8 / 16, 9 / 16]
    for blob, words in ((wav(packed, 1, 24, 2, align=4), "wanted a block align of 6 for 2 x 24 bits, got 4"),
                        (wav(packed, 1, 16, 1, align=4), "wanted a block align of 2 for 1 x 16 bits, got 4"),
                        (wav(wide[1:] + b"\0", 1, 24, 2, align=8), "in the lower three of 4 bytes, got others")):
        refused(words, audio.load_wav, blob)

@pytest.mark.skipif(not (SHARED / "cases").is_dir(), reason="../shared/cases is not here")
@pytest.mark.parametrize("name", ["a_24in4_low_arecord", "c_24in4_low_stereo"])
def test_recordings_of_24_bits_in_4_bytes_equal_the_plain_one(name):
    plain, rate_hz = audio.load_wav(SHARED / "cases/wav_24_in_4/k_plain16.wav")
    samples, own_hz = audio.load_wav(SHARED / f"cases/wav_24_in_4/{name}.wav")
    assert own_hz == rate_hz == 16000 and torch.equal(samples, plain)

@pytest.mark.parametrize("code,planted", [       # of 16 bits, from the tables of G.711
    (6, {0xD5: 8, 0x55: -8, 0xD4: 24, 0xC5: 264, 0xF5: 528, 0xAA: 32256, 0x2A: -32256, 0xA5: 16896, 0x25: -16896}),
    (7, {0xFF: 0, 0x7F: 0, 0xFE: 8, 0x7E: -8, 0xEF: 132, 0x80: 32124, 0x00: -32124, 0x8F: 16764, 0x9F: 8316})])
def test_a_law_and_mu_law_have_the_numbers_of_their_tables(monkeypatch, code, planted):  # C12
    monkeypatch.setenv("PATH", "")      # no ffmpeg
    numbers = (audio.load_wav(wav(bytes(range(256)), code, 8))[0] * 32768).numpy()
    assert {byte: numbers[byte] for byte in planted} == planted
    positive = np.sort(numbers[128:])
    assert np.array_equal(np.sort(-numbers[:128]), positive)
    spaces = [np.unique(np.diff(part)).tolist() for part in positive.reshape(8, 16)]
    assert spaces == [[16 << max(0, s - 1) if code == 6 else 8 << s] for s in range(8)]

def test_of_stereo_in_opposite_phase_the_louder_channel_is_read_with_a_warning(tmp_path, monkeypatch):  # C12
    """Also where a piece of a stream is silent; one channel alone, or two that differ, are averaged as ever."""
    monkeypatch.setattr(audio, "CHUNK_SEC", 1)
    speech = np.concatenate([np.zeros(9000), 0.25 * np.random.default_rng(0).standard_normal(20000)])
    other = 0.25 * np.random.default_rng(1).standard_normal(29000)
    quieter = -0.9 * speech
    path = write_manifest(tmp_path / "m.jsonl", [{"audio": "a.wav", "text": "a"}])
    for left, right, wanted in ((speech, -speech, "left"), (quieter + 0.3, speech, "right"), (speech, 0 * speech, ""),
                                (speech, other, ""), (speech, speech, ""), (speech, -0.2 * speech, "")):
        stereo = np.stack([left, right], 1).astype("<f4")
        (tmp_path / "a.wav").write_bytes(wav(stereo.tobytes(), 3, 32, 2))
        expected = {"left": stereo[:, 0], "right": stereo[:, 1], "": stereo.astype(float).mean(1)}[wanted]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            samples, _ = audio.load_wav(tmp_path / "a.wav")
            pieces = list(audio.stream(tmp_path / "a.wav", 8000))
            item = data.ManifestDataset(path, data_options(max_sec=9.0), letters)[0]
        np.testing.assert_allclose(samples, expected, atol=1e-7)
        assert torch.equal(torch.cat(pieces), samples)
        assert torch.equal(item.feats, audio.frontend(samples, 8000, data_options()))
        said = [str(warning.message) for warning in caught]
        assert said == 3 * [f"{tmp_path}/a.wav: the channels cancel each other (opposite phase), reading the {wanted} "
                            "one"] if wanted else said == []

def test_rf64_has_the_size_of_its_samples_in_a_chunk_of_its_own():
    payload = encode_samples([1, 2, 3, 4], 1, 16)
    ds64 = b"ds64" + struct.pack("<IQQQI", 28, 2**33, len(payload), 4, 0)
    blob = wav(payload, 1, 16, size=0xFFFFFFFF, before=ds64, after=b"LIST\4\0\0\0abcd", head=b"RF64")
    assert audio.load_wav(blob)[0].tolist() == [1 / 16, 2 / 16, 3 / 16, 4 / 16]

@pytest.mark.parametrize("size, head, found", [
    (64000, b"RIFF", "4.000"), (14400, b"RIFF", None), (0, b"RIFF", None), (2**32 - 1, b"RIFF", None),
    (0x7fffefff, b"RIFF", "134217.472"), (0x7ffff000, b"RIFF", None), (2**31, b"RIFF", None),
    (2**32 - 1, b"RF64", "536870.912")])
def test_a_recording_that_breaks_off_is_read_with_a_warning_and_a_stream_without(tmp_path, size, head, found):  # C12
    """0.8 s are there; a tenth of a second less than the header promises is no loss: some writers count the header."""
    long = b"ds64" + struct.pack("<IQQQI", 28, 2**34, 2**33, 4, 0) if head == b"RF64" else b""
    (tmp_path / "a.wav").write_bytes(wav(bytes(12800), size=size, before=long, head=head))
    path = write_manifest(tmp_path / "m.jsonl", [{"audio": "a.wav", "text": "a"}])
    parts = [audio.Part(tmp_path / "a.wav", 0.2, 0.5), audio.Part(tmp_path / "a.wav", 0.2)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(audio.load_wav(tmp_path / "a.wav")[0]) == 6400
        assert [len(audio.load_wav(part)[0]) for part in parts] == [4000, 4800]
        assert isinstance(data.ManifestDataset(path, data_options(), letters)[0], data.Utterance)
    said = f"{tmp_path}/a.wav: wanted the {found} s that its header promises, got 0.800 s: it breaks off"
    assert len(caught) == (3 if found else 0)  # the first part is whole
    assert {str(caught[i].message) for i in (0, 2) if found} == ({said} if found else set())

@pytest.mark.parametrize("form", ["text", "json"])
def test_each_warning_of_a_recording_is_a_line_of_the_servers_log(form):
    log = monitor.Log(form)
    with warnings.catch_warnings():
        serve.log_warnings(log)
        for name in ("", "a b.wav"):
            parts = (f'name="file"; filename="{name}"', wav(bytes(12800), size=64000)), field("model", "x")
            top, _, body = oai(*parts).partition(b"\r\n\r\n")
            head = web.parse_head(top)._replace(id="r7")
            sent = bodies.read_recording(head, body, serve_options())
            bodies.parse_request(head, sent, serving_system(), serve_options())
    lines = [log.lines.get_nowait() for _ in range(2)]
    assert log.lines.empty() and "request r7: wanted the 4.000 s" in lines[0]
    assert "request r7 a b.wav: wanted the 4.000 s" in lines[1]
    assert form == "text" or json.loads(lines[1])["level"] == "WARNING"

def test_loader_processes_say_a_recordings_warning_in_the_first_epoch_only(tmp_path, capfd, monkeypatch):
    (tmp_path / "a.wav").write_bytes(wav(bytes(12800), size=64000))
    path = write_manifest(tmp_path / "m.jsonl", [{"audio": "a.wav", "text": "a"}])
    dataset = data.ManifestDataset(path, data_options(), letters)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *place: os.write(2, f"{message}\n".encode())
        for epoch in range(2):
            assert len(list(data.loader(dataset, [[0]], epoch, num_workers=1))[0].keys) == 1
    assert capfd.readouterr().err.count("it breaks off") == 1
    monkeypatch.setattr(data.resource, "getrlimit", lambda kind: (87, 87))
    refused("wanted 88 open files or more for 2 processes, got 87", data.loader, dataset, [[0]], num_workers=2)

def test_a_cut_last_sample_of_a_wav_is_dropped():
    samples, _ = audio.load_wav(wav(struct.pack("<hhh", 100, 200, 300) + b"\1", 1, 16, 2, size=0))
    np.testing.assert_array_equal(samples.numpy() * 32768, [150])

@pytest.mark.parametrize("blob,words", [
    (b"", "empty file"), (b"ID3\4 an mp3", "ffmpeg"), (b"RIFF\0\0\0\0WAVE", "'data' chunk"),
    (b"RIFF\0\0\0\0WAVEdata\2\0\0\0\0\0", "'fmt ' chunk"), (wav(b"ab", 2, 4, 1), "ffmpeg"),
    (wav(b"ab", 1, 16, 0), "one channel"), (wav(b"ab", 1, 16, 1, 3), "got 1 at 3 Hz"),
    (wav(struct.pack("<fff", 0, 1, math.nan), 3, 32, 1), "nan at sample 2"),
    (wav(struct.pack("<dd", 0, 1e39), 3, 64, 1), "inf at sample 1")])
def test_a_bad_recording_is_a_value_error_that_names_the_file(tmp_path, monkeypatch, blob, words):  # C12
    monkeypatch.setenv("PATH", str(tmp_path))       # no ffmpeg
    path = tmp_path / "bad.wav"
    path.write_bytes(blob)
    for source in (path, blob):
        with pytest.raises(ValueError, match=words) as error:
            audio.load_wav(source)
        assert str(error.value).startswith(str(path) if source is path else "<bytes>")

def test_other_formats_go_through_ffmpeg_which_may_read_nothing_else(tmp_path, monkeypatch):
    planted = encode_samples([1, 2, 3, 4], 3, 32)
    (tmp_path / "answer").write_bytes(wav(planted, 3, 32, 2, 16000, size=0xFFFFFFFF))
    script = tmp_path / "ffmpeg"
    script.write_text(f'#!/bin/sh\necho "$@" >> "{tmp_path}/calls"\n[ -n "$(/bin/cat)" ] && echo piped >> '
                      f'"{tmp_path}/calls"\n/bin/cat "{tmp_path}/answer"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "a.mp3").write_bytes(b"ID3 not a WAV")
    for source in (tmp_path / "a.mp3", b"ID3 not a WAV"):
        samples, rate_hz = audio.load_wav(source)
        assert rate_hz == 16000 and samples.tolist() == [1.5 / 16, 3.5 / 16]
    path_call, bytes_call, piped = (tmp_path / "calls").read_text().splitlines()
    assert f"-protocol_whitelist file -i file:{tmp_path}/a.mp3" in path_call
    assert "-protocol_whitelist cache,pipe -read_ahead_limit -1 -i cache:pipe:0" in bytes_call and piped == "piped"
    assert audio.WORST_RATE == 8 * 192_000      # two channels of floats
    monkeypatch.setattr(audio, "WORST_RATE", 1)
    size = (tmp_path / "answer").stat().st_size
    audio.ffmpeg_to_wav(b"ID3", most_sec=size + 1).close()
    assert f"-t {size + 1}.000 -fs {size + 1} " in (tmp_path / "calls").read_text()
    with pytest.raises(ValueError, match=f"wanted a recording of at most {size} bytes once it is decoded, got more"):
        audio.ffmpeg_to_wav(b"ID3", most_sec=size)
    script.write_text(f"#!/bin/sh\necho first >&2\necho cache:pipe:0: {'said ' * 99} >&2\nexit 1\n")
    # 300 characters
    refused("ffmpeg says: said" + " said" * 58 + re.escape(" [...]") + "$", audio.load_wav, b"ID3 not a WAV")
    script.write_text("#!/bin/sh\nread pid name state parent group rest < /proc/$$/stat\necho $((pid - group)) >&2\n"
                      "exit 1\n")
    refused("ffmpeg says: 0$", audio.load_wav, b"ID3 not a WAV")  # Ctrl-C does not reach its process group
    script.write_text("#!/bin/sh\nkill -9 $$\n")
    refused(re.escape("ffmpeg says: nothing (exit code -9)"), audio.load_wav, b"ID3 not a WAV")

def test_the_duration_of_a_flac_file_is_read_from_its_header(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")      # no ffmpeg
    word = (44100 << 44) | (1 << 41) | (15 << 36) | 123456          # rate, channels - 1, bits - 1, samples
    (tmp_path / "a.flac").write_bytes(b"fLaC\x80\0\0\x22" + b"\xff" * 10 + word.to_bytes(8, "big") + bytes(16))
    assert audio.audio_seconds(tmp_path / "a.flac") == 123456 / 44100
    (tmp_path / "a.flac").write_bytes(b"fLaC\x80\0\0\x22" + bytes(17) + b"\1" + bytes(16))
    assert audio.audio_seconds(tmp_path / "a.flac") is None         # at 0 Hz

def test_save_wav_writes_16_bit_and_clips(tmp_path):
    audio.save_wav(tmp_path / "a.wav", torch.tensor([0.5, -1.0, 1.0, 7.0, -1.1, 1.6 / 32768]), 8000)
    with wave.open(str(tmp_path / "a.wav")) as file:                # the standard library as reader
        assert file.getparams()[:4] == (1, 2, 8000, 6)
        assert np.frombuffer(file.readframes(6), "<i2").tolist() == [16384, -32768, 32767, 32767, -32768, 2]

@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not here")
@pytest.mark.parametrize("suffix,lossy", [("flac", 1e-4), ("mp3", 0.05), ("ogg", 0.1), ("m4a", 0.05), ("aiff", 1e-4)])
def test_the_real_ffmpeg_reads_other_formats(tmp_path, suffix, lossy):
    """A tone at 16 kHz, from a path and from bytes: rate, length but for an encoder's padding, and samples."""
    wanted = tone(1.0, 16000)
    audio.save_wav(tmp_path / "a.wav", wanted, 16000)
    subprocess.run(["ffmpeg", "-v", "error", "-i", tmp_path / "a.wav", tmp_path / f"b.{suffix}"],
                   check=True, timeout=PATIENCE)
    samples, rate_hz = audio.load_wav(tmp_path / f"b.{suffix}")
    assert rate_hz == 16000 and abs(len(samples) - 16000) < 2400
    middle = samples[6000:10000].double()
    t = torch.arange(4000) / 16000 * 2 * math.pi * 440
    waves = torch.stack([t.sin(), t.cos()], 1).double()
    fitted = waves @ torch.linalg.lstsq(waves, middle[:, None]).solution
    assert (fitted[:, 0] - middle).abs().max() < lossy and fitted.abs().max() == pytest.approx(0.3, rel=0.1)
    if suffix != "m4a":        # its index may stand at the end, which a pipe cannot seek to
        assert torch.equal(audio.load_wav((tmp_path / f"b.{suffix}").read_bytes())[0], samples)
    assert audio.audio_seconds(tmp_path / f"b.{suffix}") == pytest.approx(len(samples) / 16000, abs=0.1)

@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not here")
def test_what_the_real_ffmpeg_gives_keeps_every_bit_both_channels_and_the_limit(tmp_path):
    """Floats beyond 1, in opposite phase."""
    left = (5 * tone(1.0, 16000)).astype("<f4")
    both = np.stack([left, -0.9 * left], 1).astype("<f4")
    (tmp_path / "a.wav").write_bytes(wav(both.tobytes(), 3, 32, 2, 16000))
    command = ["ffmpeg", "-v", "error", "-i", tmp_path / "a.wav", "-c:a", "pcm_f32be", tmp_path / "b.aiff"]
    subprocess.run(command, check=True, timeout=PATIENCE)
    with pytest.warns(UserWarning, match="opposite phase.*reading the left one"):
        samples, _ = audio.load_wav(tmp_path / "b.aiff")
    assert np.array_equal(samples, left) and left.max() > 1
    with audio.ffmpeg_to_wav(str(tmp_path / "b.aiff"), most_sec=0.5) as file:
        assert audio.read_header(file).num_samples == 8000

# ---- audio: resampling ----

RATES = [(8000, 16000), (16000, 8000), (44100, 16000), (22050, 16000), (7200, 8000), (8800, 8000), (48000, 16000),
         (4000, 384000), (384000, 4000), (8191, 8000)]

@pytest.mark.parametrize("rate_in,rate_out", RATES)
def test_resample_keeps_a_sine_below_the_cut_off_and_removes_one_above(rate_in, rate_out):  # C13
    N = rate_in // 4
    low, high = 0.4 * min(rate_in, rate_out), 0.53 * rate_out
    sine = lambda hz, n, rate: np.sin(2 * np.pi * hz * np.arange(n) / rate)
    out = audio.resample(torch.from_numpy(sine(low, N, rate_in)).float(), rate_in, rate_out).numpy()
    assert len(out) == math.ceil(N * rate_out / rate_in)
    edge = len(out) // 4
    assert np.abs(out - sine(low, len(out), rate_out))[edge:-edge].max() < 1e-4            # -80 dB
    if high < rate_in / 2:
        out = audio.resample(torch.from_numpy(sine(high, N, rate_in)).float(), rate_in, rate_out).numpy()
        assert np.abs(out[edge:-edge]).max() < 1e-4

def test_resample_to_a_higher_rate_adds_no_mirror_image():
    """Of 3760 Hz, at 4240 Hz."""
    t = np.arange(4000) / 8000
    out = audio.resample(torch.from_numpy(np.sin(2 * np.pi * 3760 * t)).float(), 8000, 16000).numpy()[2000:6000]
    image = np.exp(-2j * np.pi * 4240 * np.arange(4000) / 16000) * np.hanning(4000)
    assert 4 / 4000 * abs(out @ image) < 1e-4

def test_resample_of_coprime_rates_equals_the_direct_sum_and_keeps_constants():
    """16001 -> 15999 Hz: 15999 phases, each output with weights of its own."""
    x = np.random.default_rng(0).standard_normal(1000)
    out = audio.resample(torch.from_numpy(x).float(), 16001, 15999).numpy()
    band = 0.945 * 15999 / 16001
    for j in (0, 1, 63, 64, 500, len(out) - 1):
        t = np.arange(-200, 1200) - j * 16001 / 15999
        u = t * band / 48
        weights = np.where(np.abs(u) <= 1, np.sinc(band * t) * np.i0(7.857 * np.sqrt(np.clip(1 - u * u, 0, 1))), 0)
        assert abs((weights[200:1200] * x).sum() / weights.sum() - out[j]) < 1e-5
    flat = audio.resample(torch.ones(1000), 16001, 15999)
    assert (flat[60:-60] - 1).abs().max() < 1e-6
    assert [len(audio.resample(torch.ones(n), 1, 2)) for n in (0, 1, 3)] == [0, 2, 6]
    assert audio.fbank(torch.ones(3), 100, 1).shape == (2, 1)

# ---- pauses: segments of long recordings ----

@pytest.mark.parametrize("rate_in,rate_out", [(8000, 8000), (8000, 16000), (44100, 16000), (48000, 8000), (8191, 8000)])
def test_a_stream_gives_the_samples_of_the_whole_recording(tmp_path, monkeypatch, rate_in, rate_out):  # C78
    """Also where a piece holds one sample, or the end of the recording is nearer than what an output sees."""
    for N, chunk_sec in ((3 * rate_in // 2 + 77, 1), (rate_in + 1, 1), (rate_in, 1), (2 * rate_in + 20, 2), (0, 1)):
        monkeypatch.setattr(audio, "CHUNK_SEC", chunk_sec)
        audio.save_wav(tmp_path / "a.wav", np.random.default_rng(N).uniform(-1, 1, N), rate_in)
        whole = audio.resample(audio.load_wav(tmp_path / "a.wav")[0], rate_in, rate_out)
        for source in (tmp_path / "a.wav", (tmp_path / "a.wav").read_bytes()):
            pieces = list(audio.stream(source, rate_out))
            assert len(pieces) == math.ceil(N / (chunk_sec * rate_in))
            torch.testing.assert_close(torch.cat([torch.zeros(0), *pieces]), whole, atol=2e-6, rtol=0)

def talk(rng, plan: list[tuple[float, float]], floor_db: float, rate_hz: int = 8000) -> np.ndarray:
    """Sounds of plan[i][0] seconds, each followed by plan[i][1] seconds without, over noise of floor_db."""
    parts = [x for sound, rest in plan for x in (0.1 * rng.standard_normal(round(sound * rate_hz)),
                                                 np.zeros(round(rest * rate_hz)))]
    joined = np.concatenate(parts)
    return joined + 10 ** (floor_db / 20) * rng.standard_normal(len(joined))

@pytest.mark.parametrize("gain", [1.0, 0.01, 0.0001])
@pytest.mark.parametrize("floor_db,offset,drift", [
    (-200.0, 0, 0), (-60.0, 0, 0), (-40.0, 0, 0), (-60.0, 3.0, 0), (-50.0, -0.1, 0.3), (-200.0, 0.3, 0)])
def test_cuts_stand_in_the_middle_of_planted_pauses(floor_db, offset, drift, gain):  # C79
    """Words of 0.3 s, 0.15 s apart, in phrases with half a second between them. The drift goes up and down in 20 s."""
    rng, rate = np.random.default_rng(1), 8000
    phrases = [[(0.3, 0.15)] * int(n) + [(0.3, 0.5)] for n in rng.integers(1, 8, 30)]
    lengths = [sum(sound + rest for sound, rest in phrase) for phrase in phrases]
    pauses = np.cumsum(lengths)[:-1] - 0.25
    x = talk(rng, [word for phrase in phrases for word in phrase], floor_db)
    x += offset + drift * np.sin(2 * np.pi * np.arange(len(x)) / (20 * rate))
    samples = torch.from_numpy(gain * x).float()
    found = list(cut_at_pauses(samples.split(12345), rate, 1.0, 20.0))
    cuts = np.array([piece.start_sec for piece in found[1:]])
    wanted, last = [], 0.0
    for pause in pauses:
        if pause + 0.1 >= last + 1.0 and pause <= len(samples) / rate - 1.0:
            wanted, last = [*wanted, pause], pause
    assert len(wanted) > 15 and len(cuts) == len(wanted) and np.abs(cuts - wanted).max() < 0.06

def test_a_cut_without_a_long_pause_takes_the_longest_one_and_else_the_lowest_level():  # C79
    level = np.full(3000, -20.0)
    level[[500, 1500, 2500]] = -35.0            # single frames: one of them is the quietest place in 1000..2000
    level[:400] = level[600:650] = level[2200:2300] = -70.0     # pauses, but too early and too late
    assert abs(find_cut(level, 1000, 2000) - 1500) <= 2
    level[1200:1232] = level[1700:1738] = -70.0     # no pause has 0.4 s: the longest
    assert abs(find_cut(level, 1000, 2000) - 1719) <= 1
    level[1800:1850] = -70.0
    assert abs(find_cut(level, 1000, 2000) - 1825) <= 1
    for width, cut in ((41, 1825), (42, 1321)):     # 0.4 s exactly, once levels are smoothed over 50 ms
        level[1300:1300 + width] = -70.0
        assert abs(find_cut(level, 1000, 2000) - cut) <= 1
    assert find_cut(level[:1750], 700, 2000) == 1750       # nothing to cut for: it ends within `most`
    assert find_cut(level[2300:2500], 100, 2000) == 200    # as short as can be
    level = np.where(np.arange(2000) < 1800, -20.0, -70.0)
    for most, cut in ((2000, 2000), (1999, 1850)):          # of exactly `most`, what is silent at its end stays
        assert abs(find_cut(level, 100, most) - cut) <= 1
    assert find_cut(np.linspace(-30, -20, 2000), 700, 2000) == 2000

def test_a_pause_is_below_a_quarter_of_the_way_to_the_loudest_level_and_levels_span_70_db():  # C79
    # the middle of a pause from 95 to 145; without one, the lowest level
    for dip, cut in ((24.9, 120), (25.1, 97)):
        level = np.full(300, 100.0)
        level[:40] = 0.0
        level[95:145] = dip
        assert find_cut(level, 45, 200) == cut
    assert find_cut(np.full(300, -70.0), 45, 200) == 45 + 156 // 2  # of one level: it is all a pause
    assert find_cut(-np.arange(300.0), 45, 150) == 150  # it falls: as long as may be
    assert find_cut(np.repeat([0.0, -10.0], [5, 15]), 2, 5) == 5  # and no longer for a pause that begins there
    level = np.full(300, 100.0)
    level[60:90] = level[120:130] = 0.0  # of short pauses the longer one
    assert find_cut(level, 45, 200) == 75
    level = levels(torch.tensor([1.0, -1.0] * 50 + [0.0] * 100), 100)
    assert level.tolist() == [0.0, -70.0]
    assert levels(torch.tensor([0.1, -0.1] * 50), 100).item() == pytest.approx(-20.0, abs=1e-4)

def test_the_rate_of_a_header_and_the_rounding_of_a_part_are_exact():
    for rate, taken in ((999, False), (1000, True), (1_000_000, True), (1_000_001, False)):
        fmt = struct.pack("<HHIIHH", 1, 1, rate, rate * 2, 2, 16)
        with contextlib.nullcontext() if taken else pytest.raises(ValueError, match=f"at {rate} Hz"):
            assert audio.parse_fmt(fmt)[3] == rate
    plain, more = struct.pack("<HHIIHH", 1, 1, 8000, 16000, 2, 16), bytes(8) + b"\3\0"  # of an extensible one
    extensible = b"\xfe\xff" + plain[2:] + more
    assert [audio.parse_fmt(fmt)[0] for fmt in (plain, plain + more, extensible, extensible[:25])] == [1, 1, 3, 0xFFFE]
    refused("wanted a 'fmt ' chunk of 16 bytes or more before 'data', got 15", audio.parse_fmt, plain[:15])
    assert [audio.read_header(io.BytesIO(head)) for head in (b"RIFF\0\0\0\0AVI ", b"OggS\0\0\0\0WAVE")] == [None] * 2
    header = audio.WavHeader(1, 16, 2, 1, 1000, 44, 10_000)
    for seconds, samples in ((9.901, 10_000), (9.899, 9899), (10.5, 10_000)):
        assert audio.cut_header(header, audio.Part("a.wav", seconds=seconds)).num_samples == samples
    with pytest.raises(ValueError, match="from 0 to 10.51 s, got a recording of 10.000 s"):
        audio.cut_header(header, audio.Part("a.wav", seconds=10.51))

def test_times_turn_at_exactly_a_minute_and_an_hour():
    assert [corpora.show_length(s) for s in (59.9, 60, 3599, 3600)] == ["59.9 s", "1.0 min", "60.0 min", "1.00 h"]
    assert [dry_run.clock(s) for s in (59.9, 60, 3599, 3600)] == ["0:00:59", "0:01:00", "0:59:59", "1:00:00"]
    assert [report.timestamp(s, ",") for s in (59.9994, 59.9996, 3600)] == ["00:00:59,999", "00:01:00,000",
                                                                            "01:00:00,000"]

def test_the_limits_of_a_segment_are_exact_in_samples_and_levels():
    for least, most, samples, count in ((0.5, 2.01, 16080, 50), (0.07, 1.0, 8000, 7), (0.505, 2.0, 16000, 51)):
        pauses = Pauses(8000, least, most)
        assert (pauses.whole(), pauses.least()) == (samples, count)
        held = torch.zeros(pauses.ahead())      # a segment is certain as soon as they are there
        assert [len(pauses.ends(held[:n], 0, False)[0]) for n in (len(held) - 1, len(held))] == [0, 1]
    for least, most, taken in ((0.0, 1.0, False), (0.5, 1.0, True), (0.51, 1.0, False)):
        words = f"wanted segments of 0 < min_sec <= max_sec / 2 seconds, got {least} and {most}"
        with contextlib.nullcontext() if taken else pytest.raises(ValueError, match=words):
            assert len(list(cut_at_pauses([torch.zeros(8000)], 8000, least, most))) == 1

def test_silence_stays_with_the_speech_that_it_is_beside():
    rng = np.random.default_rng(2)
    samples = torch.from_numpy(talk(rng, [(0.0, 6.0), (2.0, 0.5), (2.0, 6.0)], -60.0)).float()
    found = list(cut_at_pauses([samples], 8000, 1.0, 15.0))
    assert [piece.start_sec for piece in found] == [0.0, pytest.approx(8.25, abs=0.06)]

@pytest.mark.parametrize("kind", ["noise", "speech", "zeros", "constant"])
def test_segments_hold_every_sample_once_within_their_bounds_whatever_the_pieces(kind):  # C79
    rng = np.random.default_rng(3)
    plan = rng.uniform(0.05, 1.0, (60, 2)) * [2.0, 1.0]
    samples = {"noise": rng.standard_normal(480123), "zeros": np.zeros(480123), "constant": np.ones(480123),
               "speech": talk(rng, plan.tolist(), -50.0)}[kind]
    samples = torch.from_numpy(samples).float()
    for least, most in ((0.5, 3.0), (2.0, 20.0), (1.0, 2.0)):
        found = list(cut_at_pauses(samples.split(50000), 8000, least, most))
        assert torch.equal(torch.cat([piece.samples for piece in found]), samples)
        lengths = np.array([len(piece.samples) for piece in found]) / 8000
        np.testing.assert_allclose([piece.start_sec for piece in found], np.cumsum([0, *lengths[:-1]]), atol=1e-9)
        assert len(found) > 1 and least - 0.01 < lengths.min() and lengths.max() <= most + 1e-9
        other = list(cut_at_pauses(samples.split(777), 8000, least, most))
        assert [piece.start_sec for piece in other] == [piece.start_sec for piece in found]
    for n in (1, 79, 81, 16000):                # up to max_sec: one piece as it is
        (piece,) = cut_at_pauses([samples[:n]], 8000, 1.0, 2.0)
        assert piece.start_sec == 0 and torch.equal(piece.samples, samples[:n])
    for rate_hz, max_sec in ((8000, 2.3), (16000, 0.29), (11025, 2.0), (22050, 4.35)):     # to the last sample
        n = round(max_sec * rate_hz)
        (piece,) = cut_at_pauses([samples[:n]], rate_hz, max_sec / 4, max_sec)
        assert len(piece.samples) == n
        pieces = list(cut_at_pauses([samples[:n + 1]], rate_hz, max_sec / 4, max_sec))
        assert len(pieces) == 2 and max(len(piece.samples) for piece in pieces) <= n
    assert list(cut_at_pauses([], 8000, 1.0, 2.0)) == []

# ---- audio: features ----

def slow_fbank(x: np.ndarray, rate_hz: int, num_mels: int) -> np.ndarray:
    """FUNASR.md section 2, frame by frame, with a direct Fourier sum."""
    window, shift, size = rate_hz * 25 // 1000, rate_hz // 100, 1
    while size < window:
        size *= 2
    mel = lambda f: 1127 * math.log(1 + f / 700)
    low, step = mel(20), (mel(rate_hz / 2) - mel(20)) / (num_mels + 1)
    rows = []
    for start in range(0, len(x) - window + 1, shift):
        frame = x[start:start + window] * 32768
        frame = frame - frame.mean()
        frame = [frame[i] - 0.97 * frame[max(0, i - 1)] for i in range(window)]
        frame = [v * (0.54 - 0.46 * math.cos(2 * math.pi * i / (window - 1))) for i, v in enumerate(frame)]
        turn = np.exp(-2j * np.pi * np.outer(np.arange(size // 2), np.arange(window)) / size)
        power = np.abs(turn @ np.array(frame)) ** 2
        row = []
        for m in range(num_mels):
            left, centre, right = low + m * step, low + (m + 1) * step, low + (m + 2) * step
            energy = 0.0
            for k in range(size // 2):
                f = mel(k * rate_hz / size)
                if left < f < right:
                    energy += power[k] * ((f - left) / step if f <= centre else (right - f) / step)
            row.append(math.log(max(energy, 2.0 ** -23)))
        rows.append(row)
    return np.array(rows)

@pytest.mark.parametrize("rate_hz,num_mels", [(16000, 80), (8000, 40)])
def test_fbank_equals_the_direct_fourier_sum(rate_hz, num_mels):  # C14
    rng = np.random.default_rng(rate_hz)
    x = (0.1 * rng.standard_normal(rate_hz // 10) + 0.05).astype(np.float32)
    expected = slow_fbank(x.astype(np.float64), rate_hz, num_mels)
    got = audio.fbank(torch.from_numpy(x), rate_hz, num_mels)
    assert got.shape == expected.shape == (8, num_mels)
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-3)

def test_fbank_and_lfr_equal_kaldi_native_fbank_and_funasr():  # C14
    """Recorded numbers: funasr_kit/units/units.npz and sanm/expected (FunASR 1.4.16, dither 0)."""
    units = np.load(kit("units/units.npz"))
    for n in (400, 559, 560, 2000):
        got = audio.fbank(torch.from_numpy(units[f"fb_in_{n}"]) / 32768, 16000, 80)
        np.testing.assert_allclose(got.numpy(), units[f"fb_out_{n}"], atol=2e-3)
    np.testing.assert_allclose(audio.fbank(torch.zeros(800), 16000, 80).numpy(), units["fb_out_zeros_800"], atol=2e-3)
    for name in units.files:
        if name.startswith("lfr_"):
            frames = torch.arange(int(name[4:])).float()[:, None]
            np.testing.assert_array_equal(audio.lfr(frames, 7, 6).numpy(), units[name])

def test_features_of_a_long_recording_equal_those_of_its_parts():
    x = 0.1 * torch.randn(16000 * 12, generator=torch.Generator().manual_seed(0))
    whole = audio.fbank(x, 16000, 80)                # 1198 frames: three blocks
    part = audio.fbank(x[500 * 160:540 * 160 + 240], 16000, 80)
    torch.testing.assert_close(whole[500:540], part, atol=1e-4, rtol=0)

@pytest.mark.parametrize("m,n", [(1, 1), (7, 6), (4, 4), (3, 1), (1, 3), (4, 2)])
def test_lfr_equals_a_loop_over_slots(m, n):
    for T in range(14):
        feats = torch.arange(T * 2).float().view(T, 2)
        rows = [sum((feats[min(max(t + j - (m - 1) // 2, 0), T - 1)].tolist() for j in range(m)), [])
                for t in range(0, T, n)]
        assert audio.lfr(feats, m, n).tolist() == rows and audio.lfr(feats, m, n).shape[1] == 2 * m

@pytest.mark.parametrize("lfr_m,lfr_n", [(1, 1), (7, 6), (4, 3)])
def test_frame_counts_are_predicted_from_the_duration(lfr_m, lfr_n):
    options = data_options(lfr_m=lfr_m, lfr_n=lfr_n)
    for N in [0, 1, 199, 200, 279, 280, 281, 1234, 8000, 8040]:      # 8040 / 8000 * 8000 is below 8040
        feats = audio.frontend(torch.zeros(N), 8000, options)
        assert feats.shape == (audio.num_frames(N / 8000, options), audio.feature_dim(options))
    assert audio.frame_sec(options) == pytest.approx(0.01 * lfr_n)

def test_compute_stats_gives_zero_mean_and_unit_deviation_in_float64():  # C15
    rng = np.random.default_rng(0)
    parts = [torch.from_numpy(1e3 + 0.1 * rng.standard_normal((n, 3))).float() for n in (5, 1, 400)]
    for part in parts:
        part[:, 2] = -15.9                          # a constant bin
    stats = audio.compute_stats(iter(parts))
    x = torch.cat(parts).double().numpy()
    np.testing.assert_allclose(stats[0], x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(1 / stats[1][:2], x.std(0)[:2], rtol=1e-4)
    flat = audio.normalise(parts[2], stats)
    assert flat[:, 2].abs().max() < 0.01 and abs(flat[:, 0].std() - 1) < 0.1 and stats[1, 2] == pytest.approx(1000)
    refused("got none", audio.compute_stats, iter([]))

@pytest.mark.parametrize("call,words", [
    (lambda: audio.fbank(torch.zeros(1, 400), 16000, 80), r"samples must be \(N,\) float, got \(1, 400\)"),
    (lambda: audio.resample(torch.zeros(9, dtype=torch.int16), 8000, 16000), r"float, got \(9,\) torch.int16"),
    (lambda: audio.resample(torch.zeros(9), 0, 16000), "rates must be positive Hz, got 0"),
    (lambda: audio.fbank(torch.zeros(9), 99, 1), "wanted rate_hz >= 100 and num_mels >= 1, got 99 and 1"),
    (lambda: audio.fbank(torch.zeros(9), 100, 0), "wanted rate_hz >= 100 and num_mels >= 1, got 100 and 0"),
    (lambda: audio.lfr(torch.zeros(80), 7, 6), r"feats must be \(T,F\) .* got \(80,\)"),
    (lambda: audio.lfr(torch.zeros(3, 2), 0, 1), "m, n >= 1, .* m=0, n=1"),
    (lambda: audio.lfr(torch.zeros(3, 2), 1, 0), "m, n >= 1, .* m=1, n=0"),
    (lambda: audio.normalise(torch.zeros(4, 80), torch.zeros(2, 40)), r"stats \(2,F\), got \(4, 80\) and \(2, 40\)"),
    (lambda: augment.spec_augment(torch.zeros(4, 30), data_options(), None), r"multiple of 20\), got \(4, 30\)"),
    (lambda: augment.spec_augment(torch.zeros(20), data_options(), None), r"multiple of 20\), got \(20,\)"),
    (lambda: audio.compute_stats([torch.zeros(3, 4), torch.zeros(4, 3)]), r"feats must be \(T,F\) .* got \(4, 3\)"),
    (lambda: audio.compute_stats([torch.zeros(3)]), r"feats must be \(T,F\) .* got \(3,\)"),
    (lambda: funasr.write_cmvn("never", torch.zeros(3, 4)), r"stats must be \(2,F\), got \(3, 4\)"),
    (lambda: audio.save_wav("never", torch.zeros(2, 9), 8000), r"samples must be \(N,\), got \(2, 9\)"),
    (lambda: data.toy_features(np.zeros(2, int), np.ones(3, int), None, None), r"U >= 1, got \(2,\) and \(3,\)"),
    (lambda: data.make_batches(np.zeros((2, 2)), 4, 9), r"lengths must be .* got \(2, 2\)"),
    (lambda: data.make_batches(np.zeros(2), 0, 1), "batch_size and batch_frames must be 1 or more, got 0 and 1"),
    (lambda: data.make_batches(np.zeros(2), 1, 0), "batch_size and batch_frames must be 1 or more, got 1 and 0"),
    (lambda: data.toy_features(np.zeros(0), np.zeros(0), None, None), r"must be \(U,\), U >= 1, got \(0,\)")])
def test_wrong_shapes_are_named(call, words):  # C7
    refused(words, call)

# ---- attention: masks ----

def ints(*values):
    return torch.tensor(values, dtype=torch.int64)

def widths(dim, num_heads, ffn_dim, kernel_size=15) -> config.EncoderConfig:
    return config.EncoderConfig("conformer", 1, dim, num_heads, ffn_dim, kernel_size, dropout=0.0)

def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)

def fresh(seed, make):
    """A module with every parameter drawn from its own generator (biases and norms too), in float64."""
    module = make().double()
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * (0.3 if p.dim() > 1 else 0.5)
    return module

def gradients(module, value):
    module.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}

def assert_same(got, wanted, tolerance=1e-12):
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)

def test_masks_are_true_where_real():  # C2
    assert padding_mask(ints(0, 2, 3), 3).tolist() == [[False] * 3, [True, True, False], [True] * 3]
    assert causal_mask(3).tolist() == [[s <= t for s in range(3)] for t in range(3)]
    assert attention.near_mask(5, 2).tolist() == [[abs(s - t) <= 2 for s in range(5)] for t in range(5)]

# ---- attention: positions ----

def test_sinusoids_equal_their_closed_form():
    wanted = [[(math.sin, math.cos)[d % 2](t / 10000 ** (2 * (d // 2) / 6)) for d in range(6)] for t in range(300)]
    np.testing.assert_allclose(sinusoids(torch.arange(300), 6).numpy(), wanted, atol=3e-5)  # float32 angles up to 300

@pytest.mark.parametrize("kind", ["sinusoidal", "learnable"])
def test_positions_are_added_and_only_sinusoids_go_past_the_table(kind):
    encode, x = PositionalEncoding(4, kind, max_len=5), normal(0, 2, 5, 4, dtype=torch.float32)
    table = sinusoids(torch.arange(5), 4) if kind == "sinusoidal" else encode.table
    assert_same(encode(x[:, :3]) - x[:, :3], table[:3].expand(2, 3, 4), 1e-6)
    assert_same(encode(x) - x, table.expand(2, 5, 4), 1e-6)  # to the end of the table
    assert PositionalEncoding(8, kind).table.shape == (2000, 8)
    longer = x.repeat(1, 2, 1)
    if kind == "sinusoidal":
        assert not encode.state_dict()
        assert_same(encode(longer) - longer, sinusoids(torch.arange(10), 4).expand(2, 10, 4), 1e-6)
    else:
        refused("learnable table ends at 5 steps, got 10", encode, longer)

# ---- attention: arithmetic ----

RAGGED = {  # name -> (mask of B=3 utterances, T queries, S keys); the second utterance has no key at all
    "none": lambda T, S: None,
    "padding": lambda T, S: padding_mask(ints(S, 0, 2), S)[:, None, :],
    "causal": lambda T, S: padding_mask(ints(S, 0, 2), S)[:, None, :] & causal_mask(max(T, S))[:T, :S],
}

def slow_attention(q, k, v, mask):
    """One query of one head at a time, over its real keys only."""
    out, (B, H, T, K) = torch.zeros_like(q), q.shape
    for b, h, t in np.ndindex(B, H, T):
        keys = [s for s in range(k.shape[2]) if mask is None or mask[b, min(t, mask.shape[1] - 1), s]]
        if keys:
            scores = [math.exp(float(q[b, h, t] @ k[b, h, s]) / math.sqrt(K)) for s in keys]
            out[b, h, t] = sum(p / sum(scores) * v[b, h, s] for p, s in zip(scores, keys))
    return out

@pytest.mark.parametrize("S", [5, 7])  # 5: as in self-attention, 7: as in cross-attention
@pytest.mark.parametrize("name", RAGGED)
def test_fused_attention_equals_the_explicit_path_and_a_slow_loop(name, S):  # C4
    mask, results = RAGGED[name](5, S), []
    for need_weights in (False, True):
        q, k, v = (normal(i, 3, 2, n, 4).requires_grad_() for i, n in enumerate((5, S, S)))
        out, weights = attend(q, k, v, mask, need_weights)
        results.append((out, *torch.autograd.grad((out * normal(9, *out.shape)).sum(), (q, k, v))))
        assert not torch.equal(attend(q, k, v, mask, need_weights, dropout=0.9)[0], out)
    for fused, explicit in zip(*results):
        assert_same(fused, explicit)
    assert_same(results[0][0], slow_attention(q.detach(), k.detach(), v.detach(), mask))
    seen = torch.ones(3, 1, dtype=torch.float64) if mask is None else mask.any(-1).double()
    assert_same(weights.sum(-1), seen[:, None].expand(3, 2, 5))
    if mask is not None:
        assert not weights.masked_select(~mask[:, None].expand_as(weights)).any()

@pytest.mark.parametrize("cross", [False, True])
def test_multi_head_attention_equals_torchs(cross):
    assert FeedForward(8, 0).layers[0].out_features == 4 * 8
    ours = fresh(1, lambda: MultiHeadAttention(8, 2, 6 if cross else None))
    theirs = nn.MultiheadAttention(8, 2, kdim=6 if cross else 8, vdim=6 if cross else 8, batch_first=True).double()
    (k, v), bias = ours.key_value.weight.chunk(2), torch.cat((ours.query.bias, ours.key_value.bias))
    weights = ({"q_proj_weight": ours.query.weight, "k_proj_weight": k, "v_proj_weight": v} if cross
               else {"in_proj_weight": torch.cat((ours.query.weight, k, v))})
    theirs.load_state_dict({**weights, "in_proj_bias": bias, "out_proj.weight": ours.out.weight,
                            "out_proj.bias": ours.out.bias})
    x, source, lens = normal(2, 3, 5, 8), normal(3, 3, 7, 6) if cross else None, ints(5, 1, 3)
    keys = x if source is None else source
    real = padding_mask(lens, keys.shape[1])
    wanted, wanted_weights = theirs(x, keys, keys, key_padding_mask=~real, average_attn_weights=False)  # ~: True = pad
    for need_weights in (False, True):
        out, weights = ours(x, source, real[:, None, :], need_weights)
        assert_same(out, wanted)
    assert_same(weights, wanted_weights)

@pytest.mark.parametrize("need_weights", [False, True])
def test_a_query_without_a_key_gives_zero_and_no_gradient(need_weights):  # C3
    module, x = fresh(0, lambda: MultiHeadAttention(4, 2)), normal(1, 2, 3, 4).requires_grad_()
    out, _ = module(x, mask=padding_mask(ints(0, 3), 3)[:, None, :], need_weights=need_weights)
    assert (out[0] == 0).all() and (out[1] != 0).all()
    grad, = torch.autograd.grad(out.square().sum() + out[0].sum(), x)
    assert (grad[0] == 0).all() and grad[1].isfinite().all() and (grad[1] != 0).any()

def test_a_causal_mask_hides_the_future():
    block, x = fresh(0, lambda: TransformerBlock(widths(4, 2, 8))), normal(1, 2, 6, 4)
    mask = padding_mask(ints(6, 5), 6)[:, None, :] & causal_mask(6)
    changed = torch.cat((x[:, :4], normal(2, 2, 2, 4)), 1)
    before, after = block(x, mask)[0], block(changed, mask)[0]
    assert_same(after[:, :4], before[:, :4])
    assert (after[:, 4:] - before[:, 4:]).abs().amax() > 0.1
    assert (block(changed, mask[:, -1:])[0][0, 0] - before[0, 0]).abs().amax() > 1e-3  # without the mask it is seen

# ---- attention: blocks ----

BLOCKS = {
    "transformer": lambda: TransformerBlock(widths(8, 2, 12)),
    "transformer with source": lambda: TransformerBlock(widths(8, 2, 12), source_dim=6),
    "conformer": lambda: ConformerBlock(widths(8, 2, 12, kernel_size=5)),
}

@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_padding_changes_no_output_and_no_gradient_of_a_block(name, need_weights):
    block, lens, source_lens = fresh(3, BLOCKS[name]), ints(6, 1, 4), ints(2, 5, 3)
    x, source = normal(1, 3, 6, 8), normal(2, 3, 5, 6) if "source" in name else None

    def run(b, T, S):
        m = {} if source is None else {"source": source[b, :S],
                                       "source_mask": padding_mask(source_lens[b], S)[:, None, :]}
        return block(x[b, :T], padding_mask(lens[b], T)[:, None, :], **m, need_weights=need_weights)[0]

    target = normal(4, 3, 6, 8)
    batch = run(slice(0, 3), 6, 5)
    wanted = gradients(block, (batch * target * padding_mask(lens, 6)[:, :, None]).sum())
    total = 0.0
    for i, (T, S) in enumerate(zip(lens.tolist(), source_lens.tolist())):
        single = run(slice(i, i + 1), T, S)
        assert_same(single[0], batch[i, :T])
        total = total + (single * target[i:i + 1, :T]).sum()
    got = gradients(block, total)
    assert got.keys() == wanted.keys() == dict(block.named_parameters()).keys()
    for key in wanted:
        assert_same(got[key], wanted[key], 1e-10)

def test_a_conformer_block_equals_its_formula():
    block, x = fresh(5, lambda: ConformerBlock(widths(4, 2, 6, kernel_size=3))), normal(6, 1, 5, 4)

    def norm(m, y):
        y = y - y.mean(-1, keepdim=True)
        return y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * m.weight + m.bias

    def feed(m, y):
        y = y @ m.layers[0].weight.T + m.layers[0].bias
        return y * y.sigmoid() @ m.layers[3].weight.T + m.layers[3].bias

    conv, y = block.convolution, x + feed(block.ffn_first, norm(block.norm_first, x)) / 2
    y = y + block.self_attention(norm(block.norm_self, y))[0]
    a, b = (norm(block.norm_conv, y) @ conv.gate.weight.T + conv.gate.bias).chunk(2, -1)
    h = torch.cat((torch.zeros(1, 1, 4), a * b.sigmoid(), torch.zeros(1, 1, 4)), 1)
    h = norm(conv.norm, sum(h[:, i:i + 5] * conv.depthwise.weight[:, 0, i] for i in range(3)) + conv.depthwise.bias)
    y = y + h * h.sigmoid() @ conv.out.weight.T + conv.out.bias
    y = y + feed(block.ffn_second, norm(block.norm_second, y)) / 2
    assert_same(block(x)[0], norm(block.norm_out, y), 1e-10)

@pytest.mark.parametrize("inner, stride, reach", [(3, 1, (2, 2)), (3, 2, (1, 1)), (3, 1, (4, 0)), (1, 1, (3, 1))])
def test_a_convolution_over_time_equals_conv1d_of_the_turned_input(inner, stride, reach):
    weight, bias = normal(1, 3, inner, sum(reach) + 1).requires_grad_(), normal(2, 3)
    x, results = normal(3, 2, 7, 3).requires_grad_(), []
    for found in (convolve(x, weight, bias, reach, stride),
                  F.conv1d(F.pad(x.transpose(1, 2), reach), weight, bias, stride, groups=3 // inner).transpose(1, 2)):
        results.append((found, *torch.autograd.grad(found.square().sum(), (x, weight))))
    for ours, theirs in zip(*results):
        assert_same(ours, theirs)

@pytest.mark.parametrize("inference", [True, False])
def test_sums_and_what_is_cut_off_overwrite_new_memory_in_inference_only(inference):
    x, y = normal(0, 2, 3), normal(1, 2, 3)
    wanted, cut = x + y, (x + y).clamp(min=0)
    with torch.inference_mode(inference):
        found = attention.plus(x, y)
        assert_same(found, wanted)
        assert (found is y) == inference and found is not x
        assert_same(attention.Relu()(found), cut)
        assert torch.equal(found, cut) == inference
        assert attention.plus(x.float(), y).dtype == torch.float64

def test_key_mask_is_the_padding_mask_for_attention_or_none_where_nothing_pads():
    assert key_mask(ints(4, 4), 4) is None and key_mask(ints(0, 0), 0).shape == (2, 1, 0)
    assert torch.equal(key_mask(ints(4, 2), 4), padding_mask(ints(4, 2), 4)[:, None, :])

@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read as Linux gives it")
def test_memory_of_attention_grows_with_the_steps_and_not_with_their_square():  # C142
    q, mask = torch.randn(1, 1, 12_000, 16), key_mask(ints(11_999), 12_000)
    peak_kb = lambda: int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak_kb()
    attend(q, q, q, mask, need_weights=False)
    assert peak_kb() - before < 60_000  # the scores alone would be 576,000

# ---- attention: errors ----

X, MASK = torch.zeros(2, 3, 4), torch.ones(2, 1, 3, dtype=torch.bool)

@pytest.mark.parametrize("call, message", [
    (lambda: check_shapes(feats=(torch.zeros(4, 80, 560), "B", "T", 80)), "feats must be (B,T,80), got (4, 80, 560)"),
    (lambda: check_shapes(x=(torch.zeros(4), "B", "T")), "x must be (B,T), got (4,)"),
    (lambda: check_lens("n", ints(1, 2), 3, 9), "n must be (3,) int64, got (2,) torch.int64"),
    (lambda: check_lens("n", ints(1, 2).int(), 2, 9), "n must be (2,) int64, got (2,) torch.int32"),
    (lambda: padding_mask(ints(1, 4), 3), "lens must lie in 0..3, got [1, 4]"),
    (lambda: padding_mask(ints(-1, 3), 3), "lens must lie in 0..3, got [-1, 3]"),
    (lambda: sinusoids(torch.arange(3), 5), "dim must be even, got 5"),
    (lambda: PositionalEncoding(4, "rotary"), "position must be sinusoidal, learnable or none, got 'rotary'"),
    (lambda: MultiHeadAttention(6, 4), "num_heads must divide dim, got 4 heads and dim 6"),
    (lambda: MultiHeadAttention(4, 2)(X, mask=MASK[:, :, :2]), "mask must be (2,1,3) or (2,3,3) bool, got (2, 1, 2)"),
    (lambda: MultiHeadAttention(4, 2)(X, mask=MASK.float()), "bool, got (2, 1, 3) torch.float32"),
    (lambda: TransformerBlock(widths(4, 2, 8))(X, MASK, X), "must be given if and only if source_dim was, got Tensor"),
    (lambda: TransformerBlock(widths(4, 2, 8), 4)(X, MASK), "if and only if source_dim was, got NoneType"),
    (lambda: ConvolutionModule(4, 4), "kernel_size must be odd, got 4")])
def test_attention_errors_name_what_was_wanted_and_got(call, message):  # C7
    assert message in message_of(call)

def test_a_length_check_reads_no_values_but_on_the_cpu():  # C93
    """A meta tensor stands for one on a GPU: whoever asks for its values gets a NotImplementedError."""
    lens = torch.empty(2, dtype=torch.int64, device="meta")
    check_lens("n", lens, 2, 3)
    refused(r"n must be \(3,\) int64, got \(2,\)", check_lens, "n", lens, 3, 3)

# ---- plot: pictures ----

def png_chunks(uri: str) -> dict[bytes, bytes]:
    """The chunks of a PNG in a data: URI, their checksums compared."""
    raw = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(raw):
        size, name = struct.unpack(">I4s", raw[at:at + 8])
        body = raw[at + 8:at + 8 + size]
        assert struct.unpack(">I", raw[at + 8 + size:at + 12 + size])[0] == zlib.crc32(name + body)
        chunks[name], at = body, at + 12 + size
    return chunks

def png_levels(uri: str) -> np.ndarray:
    """(rows, columns) of a PNG whose rows are stored without a filter."""
    chunks = png_chunks(uri)
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    return np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)[:, 1:]

def test_a_heat_map_is_a_png_whose_pixels_rank_as_the_values():
    chunks = png_chunks(plot.heat_map(np.array([[0.0, 1.0, 0.5], [1.0, 0.25, 0.0]])))
    assert struct.unpack(">IIBBBBB", chunks[b"IHDR"]) == (3, 2, 8, 3, 0, 0, 0)
    assert zlib.decompress(chunks[b"IDAT"]) == bytes([0, 0, 255, 128, 0, 255, 64, 0])
    assert chunks[b"PLTE"][:3] == bytes(plot.PALETTE[0]) and chunks[b"PLTE"][-3:] == bytes(plot.PALETTE[-1])

def test_an_alignment_stands_where_the_times_say_and_escapes_its_texts():
    alpha = torch.zeros(50)
    alpha[25] = 1.0  # of 50 frames of 0.04 s, the first of which begins at -0.02 s
    svg = plot.alignment_svg("a <b> & c\0", torch.rand(200, 8), alpha, [("<我", 0.5, 1.0), (" ", 1.0, 1.5)], 2.0,
                                  (-0.02, 1.98), torch.tensor([0.6, 1.2, 1.4]))
    root, place = ElementTree.fromstring(svg), lambda sec: plot.LEFT + plot.WIDTH * sec / 2
    for name, times in (("fire", (0.5, 1.0, 1.5)), ("true", (0.6, 1.2, 1.4))):
        paths = [e.get("d") for e in root.iter() if e.get("class") == name]
        lines = [float(d[1:].split()[0]) for d in paths if "h30" not in d]  # without the legend's
        assert lines == pytest.approx([place(sec) for sec in times], abs=0.1)
    [bar] = [float(e.get("x")) for e in root.iter() if e.get("class") == "weight"]
    assert bar == pytest.approx(place(0.98), abs=0.1)
    texts = {e.text: float(e.get("x")) for e in root.iter() if e.tag.endswith("text")}
    assert list(texts)[0] == "a <b> & c\ufffd" and texts["sum 1.00"] < plot.LEFT
    assert (texts["<我"], texts["␣"]) == (place(0.75), place(1.25))

def test_axes_have_as_many_round_numbers_as_there_is_room_for():
    panel = plot.Panel(plot.LEFT, 0, 750, 100, 1.0)
    steps = (0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300, 900, 3600)
    for step, longer in zip(steps, (*steps[1:], 3600)):
        for seconds, wanted in ((10 * step, step), (10.01 * step, longer)):
            labels = re.findall(">([^<>]+)</text>", plot.time_axis(panel._replace(seconds=seconds)))
            count = int(seconds / wanted) + 1
            assert labels == [*(f"{k * wanted:.4g}" for k in range(count)), "seconds"]
    steps = (1, 2, 5, 10, 20, 50, 100, 200, 500)
    for step, longer in zip(steps, (*steps[1:], 1000)):
        for total, wanted in ((7.99 * step / 1.03, step), (8.01 * step / 1.03, longer)):
            svg = plot.firing_svg(panel, torch.full((10,), total / 10), (0.0, 1.0))
            numbers = re.findall(r">(\d+)</text>", "".join(svg))
            assert numbers == [str(n) for n in range(0, math.floor(1.03 * total) + 1, wanted)]
            last = 100 - 100 / 1.03
            assert f"L{plot.LEFT + 750:.1f} {last:.1f}" in "".join(svg)  # the sum ends a little below the top

@pytest.mark.parametrize("size", [1, 2, 4, 40])
def test_labels_of_200_tokens_never_overlap_and_stay_inside(size):  # C97
    """Ideographs are 12 px wide in a font of 12 px, in any font."""
    rng = random.Random(size)
    starts = np.cumsum([rng.uniform(0.05, 0.4) for _ in range(201)]).tolist()
    tokens = [(f"{chr(0x4e00 + u)}" * rng.randint(1, size), *span) for u, span in enumerate(zip(starts, starts[1:]))]
    seconds, span = starts[-1], (0.0, starts[-1])
    pictures = [plot.alignment_svg("好" * 999, torch.rand(300, 4), torch.rand(90), tokens, seconds, span),
                plot.attention_svg("x", torch.rand(3, 200, 90), tokens, seconds, span, cross=True),
                plot.attention_svg("x", torch.rand(3, 90, 90), tokens, seconds, span, cross=False)]
    shown = []
    for svg in pictures:
        root, lines = ElementTree.fromstring(svg), collections.defaultdict(list)
        for e in root.findall("{*}text"):
            width, middle = 12 * len(e.text), e.get("text-anchor") == "middle"
            if ord(e.text[0]) >= 0x4e00:
                left = float(e.get("x")) - width * (0.5 if middle else e.get("text-anchor") == "end")
                lines[float(e.get("y"))].append((left, left + width))
        edges = [(a, b) for line in lines.values() for a, b in zip([(0, 0), *sorted(line)], [*sorted(line), (1e9, 0)])]
        assert all(end <= start for (_, end), (start, _) in edges)
        assert max(end for line in lines.values() for _, end in line) <= float(root.get("width"))
        shown.append(sum(map(len, lines.values())))
    assert shown[0] == 201 if size <= 2 else shown[0] > 100  # with the title

@pytest.mark.parametrize("cross", [True, False])
def test_each_head_has_a_panel_in_which_a_planted_weight_is_the_brightest(cross):  # C97
    tokens = [("a", 0.2, 0.6), ("b", 0.6, 1.0), ("c", 1.0, 1.9)]
    weights = torch.rand(4, 3 if cross else 50, 50) / 2
    planted = [(2, 7), (0, 49), (1, 0), (2, 3)]
    for h, (row, column) in enumerate(planted):
        weights[h, row, column] = 0.9
    root = ElementTree.fromstring(plot.attention_svg("x", weights, tokens, 2.0, (-0.02, 1.98), cross))
    panels = root.findall("{*}svg")
    for h, (row, column) in enumerate(planted):
        image = panels[h].find("{*}image")
        levels = png_levels(image.get("href"))
        assert np.argwhere(levels == 255).tolist() == [[row, column]]
        left, _, width, _ = map(float, panels[h].get("viewBox").split())
        assert float(image.get("x")) == pytest.approx(left - 0.01 * width, abs=0.01)
        assert float(image.get("width")) == pytest.approx(width, abs=0.01)
    texts = [e.text for e in root.iter() if e.tag.endswith("text")]
    assert [text for text in texts if text.startswith("head")] == [f"head {h}, up to 0.9" for h in (1, 2, 3, 4)]
    assert texts.count("b") == 4 + 2  # over each panel, and beside the two on the left
    ElementTree.fromstring(plot.attention_svg("none", torch.zeros(2, 0, 50), [], 1.0, (0.0, 1.0), True))

def test_a_heat_map_of_more_values_than_pixels_keeps_the_largest():
    values = torch.zeros(3000, 3000)
    values[2999, 1500] = 1.0
    panel = plot.Panel(0, 0, 300, 200, 1.0)
    image = ElementTree.fromstring(plot.image_svg(panel, values, (0, 1), (0, 1))).find("{*}image")
    levels = png_levels(image.get("href"))
    assert levels.shape == (200, 300) and np.argwhere(levels).tolist() == [[199, 150]]

# ---- web: connections ----

def test_headers_ids_methods_and_keep_alive(server):
    with connected(server) as connection:
        for path, kind in (("/", "text/html; charset=utf-8"), ("/health", "application/json"),
                           ("/v1/models", "application/json"), ("/v1/models/paraformer", "application/json"),
                           ("/metrics", "text/plain; version=0.0.4; charset=utf-8")):
            for method in ("GET", "HEAD"):          # a body after HEAD would break the next answer
                connection.sendall(get(f"{method} {path} HTTP/1.1", "X-Request-Id: my-id.1"))
                answered, body = read_answer(connection, method)
                assert answered.status == 200 and bool(body) == (method == "GET")
                assert answered.headers["X-Request-Id"] == "my-id.1"
                assert answered.headers["Content-Type"] == kind and answered.headers["Cache-Control"] == "no-store"
                sent_at = email.utils.parsedate_to_datetime(answered.headers["Date"]).timestamp()
                assert abs(time.time() - sent_at) < 9 * PATIENCE
                assert answered.headers["X-Content-Type-Options"] == "nosniff"
    for path, allow in serve.ROUTES.items():
        status, headers, _ = exchange(server, get(f"OPTIONS {path.replace('{id}', 'x')} HTTP/1.1"))
        assert status == 204 and headers["allow"] == allow and headers["server"] == "serve.py"
        assert not {"access-control-allow-origin", "content-length", "connection"} & set(headers)
    for given, is_echoed in (("a" * 64, True), ("a" * 65, False), ("a<b", False)):
        found = exchange(server, get("GET /health HTTP/1.1", f"X-Request-Id: {given}"))[1]["x-request-id"]
        assert (found == given) == is_echoed
    for raw in (b"GET /health HTTP/1.0\r\n\r\n", get("GET /health HTTP/1.1", "Connection: keep-alive, Close")):
        assert exchange(server, raw)[1]["connection"] == "close"
    policies = []
    for _ in range(2):
        _, headers, page = exchange(server, get("GET / HTTP/1.1"))
        policies.append(headers["content-security-policy"])
        nonce = re.search("nonce-([0-9a-f]{32})'", policies[-1])[1]
        assert page.count(f'nonce="{nonce}"'.encode()) == 2 and b"up to 20 s" in page
    assert policies[0] != policies[1] and "frame-ancestors 'none'" in policies[0]
    kinds = ("audio/any", "video/webm", "video/mp4", "video/ogg", "text/audio")
    assert [serve.is_taken(kind, "/transcribe") for kind in kinds] == [True, True, True, False, False]

def test_a_message_has_1000_characters_at_most_and_a_flag_few_spellings():
    error = json.loads(web.Refusal(400, "code", "a" * 2000).response().body)["error"]
    assert error["message"] == "a" * 1000
    kinds = [web.Refusal(status, "", "").entry()["type"] for status in (401, 429, 499, 500)]
    assert kinds == ["authentication_error", "rate_limit_error", "invalid_request_error", "server_error"]
    with pytest.raises(web.Refusal, match="got '" + "x" * 40 + "'$"):
        openai_forms.parse_openai_form({"response_format": ["x" * 50]})
    given = (True, "TRUE", "1", False, "False", "0", "", None)
    assert [web.parse_flag("alignment", value) for value in given] == [True] * 3 + [False] * 5

def test_pipelined_and_dribbled_requests_are_told_apart(server):
    one, two = post_json({"features": ROWS[:30]}), get("GET /health HTTP/1.1", "Connection: close")
    with connected(server) as connection:
        for i in range(0, len(one), 997):
            connection.sendall(one[i:i + 997])
        connection.sendall(b"\r\n" + one + two)
        got = b""
        while piece := connection.recv(65536):
            got += piece
    assert got.count(b"HTTP/1.1 200 OK") == 3 and got.count(b'"frames": 30') == 2 and got.count(b'"status": "ok"') == 1

def test_expect_continue_is_answered_before_the_body_and_refused_on_the_length(server):
    body = CHUNKED_BODY
    head = post_json(body)[:-len(body) - 2] + b"Expect: 100-continue\r\n\r\n"
    whole = chunked(b"").replace(b"Host: x", b"Host: x\r\nExpect: 100-continue")
    for first, rest in ((head, body), (whole, b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))):
        with connected(server) as connection:
            connection.sendall(first)
            assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
            connection.sendall(rest)
            assert connection.recv(20).startswith(b"HTTP/1.1 200")
    assert exchange(server, head.replace(b"Content-Length: ", b"Content-Length: 9999"))[0] == 413
    kept = [web.parse_head(b"POST / HTTP/1.%d\r\nHost: x\r\nExpect: 100-continue" % i).headers for i in (0, 1)]
    assert ["expect" in headers for headers in kept] == [False, True]       # HTTP/1.0 does not know 100
    connection, told = object.__new__(web.Connection), []
    connection.server = SimpleNamespace(limits=web.Limits(*[60] * 6, ()))
    connection.request = SimpleNamespace(sendall=told.append)
    for expect, come in (("100-continue", b"{}"), ("", b""), ("100-continue", b"")):
        connection.buffer = bytearray(come)
        asked = web.unread_head()._replace(headers={"expect": expect}, length=len(come))
        assert connection.read_body(asked) == come
        assert told == [b"HTTP/1.1 100 Continue\r\n\r\n"] * bool(expect and not come)      # no body has come yet

@pytest.mark.parametrize("sizes", [[1], [7, 1, 300], [10**6]])
def test_a_chunked_body_is_what_it_would_be_whole(server, sizes):  # C191
    """With extensions and trailers, which are discarded; the connection goes on. Oracle: the same with its length."""
    pieces, rest = [], CHUNKED_BODY
    for size in itertools.cycle(sizes):
        pieces.append(b"%X;a=\"b\"\r\n%b\r\n" % (len(rest[:size]), rest[:size]))
        rest = rest[size:]
        if not rest:
            break
    raw = chunked(b"".join(pieces) + b"000\r\nA: b\r\nB:\r\n\r\n")
    with connected(server) as connection:
        for i in range(0, len(raw), 5000):
            connection.sendall(raw[i:i + 5000])
        assert json.loads(read_answer(connection)[1])["tokens"] == ask(server, post_json(CHUNKED_BODY))["tokens"]
        connection.sendall(get())
        assert connection.recv(20).startswith(b"HTTP/1.1 200")

def test_a_chunked_upload_of_the_standard_librarys_client(server):  # C191
    client = http.client.HTTPConnection(*server.server_address[:2], timeout=PATIENCE)
    raw = wav(NOISE)
    client.request("POST", "/transcribe", iter([raw[:9000], raw[9000:]]), {"Content-Type": "audio/wav"},
                   encode_chunked=True)
    found = json.loads(client.getresponse().read())
    assert found["tokens"] == ask(server, post("/transcribe", "audio/wav", raw))["tokens"]
    client.close()

def test_who_has_closed_only_its_sending_side_gets_its_answer():  # C56
    with holding() as (server, held, pool):
        late = exchange(server, post_json({"features": ROWS[:30], "timeout": 0.1}), end=True)
        waiting = [pool.submit(exchange, server, post_json({"features": ROWS[:30]}), end=True) for _ in range(3)]
        wait_until(lambda: len(server.batcher.waiting) == 4)
        held.set()
        assert check_error(*late)[0] == 504 and [one.result()[0] for one in waiting] == [200] * 3
    connection, asked = object.__new__(web.Connection), []
    connection.writing, connection.probed = threading.Lock(), False
    connection.request, client = socket.socketpair()
    with connection.request, client:
        client.shutdown(socket.SHUT_WR)
        connection.poll = lambda events, most_ms: asked.append(most_ms) or not most_ms
        assert [connection.has_left(), connection.has_left(), asked] == [False, False, [0, 2, 0, 2]]    # ms for a reset
        assert client.recv(99) == b"HTTP/1.1 "      # once

def test_stalled_and_trickling_clients_end_at_their_deadline_and_slow_nobody():  # C58
    with serving(header_timeout=10 * PATIENCE, body_timeout=10 * PATIENCE) as server, contextlib.ExitStack() as kept:
        stalled = [kept.enter_context(connected(server)) for _ in range(50)]
        for i, connection in enumerate(stalled):
            connection.sendall(b"GET /hea" if i % 2 else post_json({"features": ROWS})[:200])
        wait_until(lambda: list(server.phases.values()) == ["reading"] * 50)
        for _ in range(5):              # who waited for them would wait too long
            assert exchange(server, post_json({"features": ROWS[:30]}))[0] == 200
        wait_until(lambda: list(server.phases.values()) == ["reading"] * 50)
    with serving(header_timeout=0.5, body_timeout=0.5) as server, contextlib.ExitStack() as kept:
        stalled = [kept.enter_context(connected(server)) for _ in range(10)]
        for i, connection in enumerate(stalled):
            connection.sendall(b"GET /hea" if i % 2 else post_json({"features": ROWS})[:200])

        def all_answered() -> bool:
            """A byte now and then does not extend the deadline."""
            answered = select.select(stalled, [], [], 0.01)[0]
            for connection in set(stalled) - set(answered):
                with contextlib.suppress(ConnectionError):      # its answer comes at this moment
                    connection.sendall(b"a")
            return len(answered) == len(stalled)

        wait_until(all_answered)
        for connection in stalled:
            answered, body = read_answer(connection)
            assert answered.status == 408 and json.loads(body)["error"]["code"] == "request_timeout"

class Large(web.Door):
    """Answers with 32 MiB, more than the buffers of a connection take in for a client that does not read."""

    def admit(self, head):
        pass

    def answer(self, head, body, has_left):
        return web.Response(200, "text/plain", bytes(2**25))

    def count_and_log(self, head, response):
        self.log(response.status)

    def shutdown_request(self, request):
        self.log((request.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY), threading.current_thread().daemon))
        super().shutdown_request(request)

POST_HEAD = b"POST / HTTP/1.1\r\nHost: x\r\n"
CHUNKED_HEAD = POST_HEAD + b"Transfer-Encoding: chunked\r\n\r\n"

@pytest.mark.parametrize("limit, sent, status", [
    ("idle_timeout", b"", None), ("header_timeout", b"GET /", 408),
    ("body_timeout", POST_HEAD + b"Content-Length: 2\r\n\r\n{", 408),
    ("body_timeout", CHUNKED_HEAD + b"5\r\n{", 408), ("write_timeout", b"GET / HTTP/1.0\r\n\r\n", 499),
    ("max_body_mb", CHUNKED_HEAD + b"4CCCD\r\n", 413)])
def test_each_wait_for_a_client_has_a_limit_of_its_own(monkeypatch, limit, sent, status):  # C58
    """0.3 s, where every other limit is a minute; then the port is free at once."""
    rests, seen = [], []
    monkeypatch.setattr(web.Connection, "read_away", lambda self, seconds: rests.append(seconds))
    limits = web.Limits(*[10 * PATIENCE] * 6, ())._replace(**{limit: 0.3})
    door = serve.start(Large("127.0.0.1", 0, limits, seen.append))
    door.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)      # a connection has it from here
    started = time.monotonic()
    with connected(door) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(sent)
        wait_until(lambda: (1, True) in seen and not door.phases)      # no delay, and a thread that keeps nobody alive
        assert status == 413 or 0.3 <= time.monotonic() - started
    assert seen == [status] * (status is not None) + [(1, True)] and rests == {408: [0.5], 413: [3.0]}.get(status, [])
    door.shutdown()
    door.server_close()
    web.Door(*door.server_address, limits, print).server_close()

def test_a_refused_body_is_read_away_up_to_64_mib_and_a_body_has_100_000_chunks_at_most(monkeypatch):
    connection = object.__new__(web.Connection)
    connection.request = SimpleNamespace(shutdown=lambda how: None)
    connection.server = SimpleNamespace(limits=web.Limits(60, 60, 60, 60, 1, 60, ()))
    pieces = []
    connection.read_some = lambda deadline: pieces.append(1) or bytes(2**20)
    connection.read_away(3.0)
    assert len(pieces) == 64
    assert web.MAX_CHUNKS == 100_000
    monkeypatch.setattr(web, "MAX_CHUNKS", 3)
    for count in (2, 3):                # and the last, which is empty
        connection.buffer = bytearray(b"1\r\na\r\n" * count + b"0\r\n\r\n")
        with contextlib.nullcontext() if count == 2 else pytest.raises(web.Refusal, match="at most 3 chunks"):
            assert connection.read_chunks(math.inf) == b"aa"

def test_refused_connections_are_closed_after_a_second_or_when_256_more_have_come():
    closed = []
    door = SimpleNamespace(refused=[], limits=SimpleNamespace(max_connections=1), count_and_log=print)
    before = time.monotonic()
    web.Door.refuse(door, socket.socketpair()[0], "127.0.0.1")
    assert before + 1 <= door.refused.pop()[0] <= time.monotonic() + 1
    door.refused += [(before, SimpleNamespace(close=lambda: closed.append("late")))]
    for count, ended in ((2, ["late"]), (256, ["late", 1, 1])):
        door.refused += [(math.inf, SimpleNamespace(close=lambda: closed.append(1)))] * count
        web.Door.service_actions(door)
        assert (len(door.refused), closed) == (count, ended)

@contextlib.contextmanager
def holding(**changes):
    """A server whose model, which takes one utterance at a time, has `first` until `held` is set."""
    begun, held, system = threading.Event(), threading.Event(), serving_system()
    greedy = system.model.greedy
    system.model.greedy = lambda *given: (begun.set(), held.wait(PATIENCE), greedy(*given))[2]
    with serving(system, max_batch_size=1, **changes) as server, concurrent.futures.ThreadPoolExecutor(16) as pool:
        server.first = pool.submit(exchange, server, post_json({"features": ROWS[:30]}))
        try:
            assert begun.wait(PATIENCE)
            yield server, held, pool
        finally:
            held.set()

def test_full_queue_is_429_and_a_passed_deadline_504():  # C58
    with holding(max_queue=2) as (server, held, pool):
        late = exchange(server, post_json({"features": ROWS[:30], "timeout": 0.1}))
        assert late[1]["x-should-retry"] == "false" and check_error(*late) == (504, "deadline_exceeded")
        asked = [pool.submit(exchange, server, post_json({"features": ROWS[:30]}))]      # behind the late one
        wait_until(lambda: len(server.batcher.waiting) == 2)
        refused = exchange(server, post_json({"features": ROWS[:30]}))
        assert refused[1]["retry-after"] == "1" and check_error(*refused) == (429, "queue_full")
        assert healthy(server) and not server.first.done()          # the model is busy all the while
        held.set()
        assert asked[0].result()[0] == server.first.result()[0] == 200

def test_who_waits_for_a_parser_gets_his_504_in_time_and_is_not_parsed(monkeypatch):  # C58
    read, parsed, gate = bodies.parse_request, [], threading.Event()
    monkeypatch.setattr(transcribe, "parse_request",
                        lambda *given: (gate.wait(PATIENCE), parsed.append(1), read(*given))[2])
    with serving(request_timeout=0.4) as server, concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: exchange(server, post_json({"features": ROWS[:30]})), range(4)))
        assert [check_error(*one) for one in found] == [(504, "deadline_exceeded")] * 4 and not parsed
        gate.set()
        server.parser.submit(len, "").result(PATIENCE)        # what comes behind them
        assert len(parsed) == 1

def test_clients_that_leave_are_dropped_before_the_model_runs():  # C56
    with holding() as (server, held, _):
        for i in range(5):
            with connected(server) as connection:
                connection.sendall(post_json({"features": ROWS[:40]}))
                wait_until(lambda: len(server.batcher.waiting) == i + 1)
        held.set()
        assert server.first.result()[0] == 200
        wait_until(lambda: sum("status=499" in line for line in server.lines) == 5)
        assert sum(" WARNING request " in line for line in server.lines) == 5       # which is no fault of the server
        assert metrics_of(server)["asr_batch_size_count"] == 1

def test_connections_above_the_cap_get_503_and_room_is_made_again():  # C58
    with serving(max_connections=3) as small:
        held = [connected(small) for _ in range(3)]
        wait_until(lambda: len(small.phases) == 3)
        found = exchange(small, get())
        assert check_error(*found) == (503, "overloaded")
        assert (found[1]["retry-after"], found[1]["connection"]) == ("1", "close")
        for connection in held:
            connection.close()
        wait_until(lambda: not small.phases)
        text = exchange(small, get("GET /metrics HTTP/1.1"))[2].decode()
        assert 'asr_rejected_total{reason="overloaded"} 1\n' in text and 'status="503"' not in text

def test_key_is_wanted_where_it_is_set(monkeypatch):  # C58
    monkeypatch.setenv("ASR_API_KEY", "secret")
    with serving() as locked:
        for header in ((), ("Authorization: Bearer wrong",), ("Authorization: secret",),
                       ("Authorization: Basic secret",), ("Authorization: Bearer",)):
            found = exchange(locked, get("GET /v1/models HTTP/1.1", *header))
            assert check_error(*found) == (401, "invalid_api_key") and b"secret" not in found[2]
        for scheme in ("Bearer", "bearer"):
            assert exchange(locked, get("GET /v1/models HTTP/1.1", f"Authorization: {scheme} secret"))[0] == 200
        for path in ("/", "/health", "/ready", "/metrics"):
            assert exchange(locked, get(f"GET {path} HTTP/1.1"))[0] == 200
        assert exchange(locked, get("OPTIONS /transcribe HTTP/1.1"))[0] == 204      # browsers ask without a key
        assert not any("secret" in line for line in locked.lines)

def test_cors_is_for_named_origins_or_with_a_star_for_any():  # C58
    with serving(cors_origin=["https://a.example"]) as open_door:
        preflight = exchange(open_door, get("OPTIONS /transcribe HTTP/1.1", "Origin: https://a.example",
                                            "Access-Control-Request-Method: POST",
                                            "Access-Control-Request-Headers: x-stainless-os"))
        assert preflight[0] == 204 and preflight[1]["access-control-allow-origin"] == "https://a.example"
        assert preflight[1]["access-control-allow-methods"] == "POST, OPTIONS" and preflight[1]["vary"] == "Origin"
        assert preflight[1]["access-control-allow-headers"] == "x-stainless-os"     # of OpenAI's client in a page
        assert preflight[1]["access-control-max-age"] == "600"
        assert preflight[1]["access-control-expose-headers"] == "X-Request-Id, Retry-After"
        other = exchange(open_door, get("GET /health HTTP/1.1", "Origin: https://b.example"))
        assert "access-control-allow-origin" not in other[1]
    with serving(cors_origin=["*"]) as open_door:
        found = exchange(open_door, get("GET /health HTTP/1.1", "Origin: https://b.example"))
        assert found[1]["access-control-allow-origin"] == "*"
        assert "access-control-allow-origin" not in exchange(open_door, get())[1]

@pytest.mark.parametrize("given,origin", [
    ("https://a.example", "https://a.example"), ("https://A.Example/", "https://a.example"), ("*", "*"),
    ("HTTPS://a.example:443", "https://a.example"), ("http://localhost:3000", "http://localhost:3000"),
    ("http://[::1]:80", "http://[::1]"), ("http://a:8", "http://a:8"), ("http://a:65535", "http://a:65535")])
def test_an_origin_is_read_as_browsers_send_it(given, origin):  # C196
    assert serve.parse_arguments(["--cors-origin", given]).cors_origin == [origin]

@pytest.mark.parametrize("flags,words", [
    (["--vad", ""], "wanted a path, got an empty"),
    (["--cors-origin", "a.example"], "wanted an origin like"), (["--cors-origin", "https://a.example/x"], "got 'https"),
    (["--cors-origin", "ftp://a.example"], "wanted an origin"), (["--cors-origin", "http://a:100000"], "wanted an or"),
    (["--trusted-proxy", "nginx"], "--trusted-proxy: 'ngi"),
    (["--log-format", "xml"], "--log-format"), (["--host", ""], "--host: wanted an address"),
    *((["--port", port], f"--port must be 0 to 65535, got {port}") for port in ("-1", "65536")),
    (["--vad-schedule", "funasr"], "--vad-schedule needs --vad"),
    (["--threads", "-1"], "--threads must be 0 or more"), (["--max-queue", "0"], "--max-queue must be above 0"),
    *((["--body-timeout", value], "--body-timeout must be above 0") for value in ("0", "inf", "nan"))])
def test_a_flag_that_would_never_work_is_refused_at_the_start(capsys, flags, words):  # C34 C196
    with pytest.raises(SystemExit) as stopped:
        serve.parse_arguments(flags)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and words in error and error.count("\n") == 1

def test_every_number_of_serve_has_its_default_and_its_least_value():  # C196
    """Seconds, ms, MiB, utterances, frames and rows as shared/HTTP.md has them."""
    wanted = {"host": "127.0.0.1", "port": 8000, "device": "auto", "dtype": "float32", "threads": 0,
              "max_batch_size": 16, "max_wait_ms": 5, "max_batch_frames": 20000, "max_queue": 128,
              "request_timeout": 30, "header_timeout": 10, "body_timeout": 30, "write_timeout": 15, "idle_timeout": 15,
              "drain_timeout": 20, "max_body_mb": 25, "max_audio_seconds": 60, "max_frames": 6000,
              "max_connections": 256, "log_format": "text"}
    assert vars(serve.parse_arguments([])).items() >= wanted.items()
    least = {"port": 65535, "threads": 0, "max_wait_ms": 0, "max_queue": 1, "idle_timeout": 0.001}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in least.items()]
    assert vars(serve.parse_arguments(flags)).items() >= least.items()
    proxies = serve.parse_arguments(["--trusted-proxy", "10.1.2.3/8"]).trusted_proxy
    assert proxies == [ipaddress.ip_network("10.0.0.0/8")]

@pytest.mark.parametrize("given,key", [("secret\n", "secret"), (" s-3.~+/= ", "s-3.~+/="), ("", ""),
                                       ("two words", None), ("schlüssel", None), (" \n", None), ("a\tb", None)])
def test_a_key_that_no_client_can_send_is_trimmed_or_refused(monkeypatch, given, key):  # C196
    monkeypatch.setenv("ASR_API_KEY", given)
    if key is not None:
        assert serve.read_key() == key
        return
    words = "a space or another character within" if given.strip() else "spaces only"
    with pytest.raises(ValueError, match=f"ASR_API_KEY: wanted ASCII letters, digits and signs, got {words}") as told:
        serve.read_key()
    assert given.strip() == "" or given.strip() not in str(told.value)

def test_drain_answers_what_came_whole_refuses_the_rest_and_cuts_the_stuck(monkeypatch):  # C59
    assert serve.CUT_SEC == 2.0
    monkeypatch.setattr(serve, "CUT_SEC", 0.2)
    with holding() as (ending, held, pool):
        raw = post_json({"features": ROWS[:30]})
        accepted = [ending.first, pool.submit(exchange, ending, raw), pool.submit(exchange, ending, raw)]
        stuck = pool.submit(exchange, ending, b"POST /transcribe HTTP/1.1\r\n")
        wait_until(lambda: sorted(ending.phases.values()) == ["busy"] * 3 + ["reading"])
        started, asked, cut = time.monotonic(), threading.Event(), ending.cut
        ending.cut = lambda *given: (asked.wait(PATIENCE), cut(*given))
        drained = pool.submit(serve.drain, ending, 10 * PATIENCE)
        wait_until(ending.draining.is_set)
        status, headers, body = exchange(ending, get())
        assert status == 503 and json.loads(body)["status"] == "draining" and headers["connection"] == "close"
        assert headers["retry-after"] == "5"
        assert exchange(ending, post_json({"features": ROWS[:30]}))[0] == 503
        asked.set()
        held.set()
        assert [one.result()[0] for one in accepted] == [200] * 3
        drained.result()
        assert 0.2 <= time.monotonic() - started < 9 * PATIENCE and stuck.result()[0] == 503
        with pytest.raises(OSError):
            exchange(ending, get())

@pytest.mark.parametrize("timeout, cuts", [(20.0, [2.0, 19.0]), (6.0, [1.8, 5.0]), (1.0, [0.3, 0.5])])
def test_a_drain_cuts_who_is_idle_and_then_who_still_sends(monkeypatch, timeout, cuts):  # C59
    """Seconds from its start."""
    seen = []
    monkeypatch.setattr(serve, "time", SimpleNamespace(monotonic=lambda: 7.0))
    server = SimpleNamespace(draining=threading.Event(), shutdown=list, server_close=list,
                             cut=lambda phases, until: seen.append((phases, until - 7.0)),
                             batcher=SimpleNamespace(changed=threading.Lock(), waiting=[], steps=[]))
    serve.drain(server, timeout)
    assert [phases for phases, _ in seen] == [["idle", "socket"], ["idle", "reading"]] and server.draining.is_set()
    assert [until for _, until in seen] == pytest.approx(cuts)

def test_a_drain_ends_in_time_and_refuses_who_still_waits():  # C59
    with holding() as (ending, held, pool):
        asked = [pool.submit(exchange, ending, raw) for raw in (*[post_json({"features": ROWS[:30]})] * 2, b"GET /")]
        wait_until(lambda: sorted(ending.phases.values()) == ["busy"] * 3 + ["reading"])
        wait_until(lambda: len(ending.batcher.waiting) == 2)
        started = time.monotonic()
        serve.drain(ending, 1.0)
        assert 0.5 <= time.monotonic() - started
        held.set()
        assert [one.result()[0] for one in (ending.first, *asked)] == [200, 503, 503, 503]

def test_a_connection_that_is_reset_before_a_request_is_none():
    with serving() as server:
        with connected(server) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))      # close resets
        assert healthy(server)          # taken up behind it
        wait_until(lambda: not server.phases)
        assert len(server.lines) == 1 and "status=200" in server.lines[0]

def test_a_fault_of_the_server_is_500_with_its_place_in_the_log_and_ends_nothing(monkeypatch):
    def fail(*_):
        raise ZeroDivisionError

    with serving() as server, connected(server) as connection:
        with monkeypatch.context() as broken, Talker(server) as client:
            broken.setattr(serve, "health", fail)
            broken.setattr(sessions, "written_text", fail)
            connection.sendall(get("GET /health HTTP/1.1", "X-Request-Id: a"))
            answered, body = read_answer(connection)
            assert check_error(answered.status, {k.lower(): v for k, v in answered.getheaders()}, body) == (
                500, "internal")
            client.send({"audio_fs": 8000, "is_end": True})
            client.send(NOISE.tobytes())
            client.send({"is_end": True})
            answers = [client.read() for _ in range(5)][2:]
            assert answers[0]["error"]["code"] == "internal" and answers[1]["is_final"] and answers[2]["error"]
            broken.undo()
            assert client.say({}, NOISE.tobytes())[0]["text"]
        connection.sendall(get())
        assert read_answer(connection)[0].status == 200
        told = re.compile("[^ ]* ERROR request id=a .* status=500 .* error=internal")
        wait_until(lambda: any(map(told.fullmatch, list(server.lines))))        # written behind its answer
    faults = [line for line in server.lines if " ERROR bug id=" in line]
    assert len(faults) == 2 and all("in fail" in line and "ZeroDivisionError" in line for line in faults)

def test_burst_of_200_gets_answers_or_429_and_no_resets(server):
    with concurrent.futures.ThreadPoolExecutor(200) as pool:
        found = list(pool.map(lambda _: exchange(server, post_json({"features": ROWS[:60]}))[0], range(200)))
    assert set(found) <= {200, 429} and found.count(200) >= 100 and healthy(server)
    about = server.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)     # of linux/tcp.h, tcpi_sacked:
    assert struct.unpack_from("I", about, 28)[0] == 1024                            # what may wait to be accepted

@contextlib.contextmanager
def started(tmp_path, *command: str):
    """A server that is starting in a process of its own, which is killed behind its use."""
    command = [*command, "--ckpt", saved(serving_system(), tmp_path / "best.pt"), "--port=0"]
    with subprocess.Popen(command, cwd=HERE, text=True, stderr=subprocess.PIPE) as process:
        limit = threading.Timer(2 * PATIENCE, process.kill)
        limit.start()
        try:
            yield process
        finally:
            limit.cancel()
            process.kill()

@contextlib.contextmanager
def own_process(zygote, tmp_path, first: str = ""):
    """A server in a process of its own, once it listens: pid, what it says, what `exchange` takes for a server."""
    os.mkfifo(tmp_path / "said")
    ckpt = saved(serving_system(), tmp_path / "best.pt")
    argv = ["--ckpt", ckpt, "--port=0", f"--drain-timeout={9 * PATIENCE}"]
    pid = zygote.start(tmp_path / "said", *argv, script="serve", first=first)
    with open(tmp_path / "said") as said:
        try:
            assert " INFO loading host=127.0.0.1 port=" in (line := said.readline()) and f"checkpoint={ckpt}" in line
            port = int(re.search(r"listening on http://127.0.0.1:(\d+)", said.readline())[1])
            yield pid, said, argparse.Namespace(server_address=("127.0.0.1", port))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

def read_until(said, words: str) -> None:
    """Read what a process says, up to a line with these words."""
    for line in said:
        if words in line:
            return
    pytest.fail(f"it ended without {words}")

def test_a_signal_that_another_thread_receives_is_seen_while_the_main_thread_waits():  # C59
    received, written = serve.catch_signals()
    hit = threading.Timer(0.1, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGTERM))
    hit.start()
    assert select.select([received], [], [], PATIENCE)[0] and os.read(received, 9) == bytes([signal.SIGTERM])
    hit.join()
    signal.set_wakeup_fd(-1)
    os.close(written)
    os.close(received)

def test_sigterm_under_load_answers_what_was_accepted_and_exits_0(zygote, tmp_path):  # C59
    """With stuck clients and nobody who reads its log."""
    with own_process(zygote, tmp_path, "serve.CUT_SEC = 0.2") as (pid, _, server), contextlib.ExitStack() as kept:
        for sent in (b"", post_json({"features": ROWS})[:-9], post_json({"features": ROWS})[:-9]):
            kept.enter_context(connected(server)).sendall(sent)
        asked = [kept.enter_context(connected(server)) for _ in range(24)]
        for connection in asked:
            connection.sendall(post_json({"features": ROWS}))
        wait_until(lambda: metrics_of(server)["asr_connections"] == 24 + 3 + 1)
        os.kill(pid, signal.SIGTERM)
        counts = collections.Counter(read_answer(connection)[0].status for connection in asked)
        assert zygote.wait(pid) == 0 and set(counts) <= {200, 503} and counts[200] > 0

STOPS = {  # way: trials, the signals
    "under load": (50, [signal.SIGTERM]), "Ctrl-C under load": (20, [signal.SIGINT]), "idle": (10, [signal.SIGTERM]),
    "during the start": (10, [signal.SIGTERM]), "twice under load": (10, [signal.SIGTERM, signal.SIGTERM])}

def post_once(address: tuple[str, int], raw: bytes) -> int:
    """The status; 0 where the connection was not taken up any more."""
    with contextlib.suppress(OSError):
        return exchange(argparse.Namespace(server_address=address), raw)[0]
    return 0

@slow
def test_a_hundred_stops_are_seen(zygote, tmp_path):  # C59
    """At any moment, with 200 requests at once where there is load."""
    raw, rng = post_json({"features": ROWS[:10]}), random.Random(0)
    argv = ["--ckpt", saved(serving_system(), tmp_path / "best.pt"), "--port=0"]
    with concurrent.futures.ThreadPoolExecutor(200) as pool:
        for trial, way in enumerate(way for way, (trials, _) in STOPS.items() for _ in range(trials)):
            log, loads = tmp_path / f"log{trial}", []
            pid = zygote.start(log, *argv, script="serve")
            if way != "during the start":
                wait_until(lambda: log.exists() and "http://127.0.0.1:" in log.read_text())
            if "load" in way:
                port = int(re.search(r"http://127.0.0.1:(\d+)", log.read_text())[1])
                loads = [pool.submit(post_once, ("127.0.0.1", port), raw) for _ in range(200)]
            time.sleep(rng.uniform(0.0, 0.3))
            for number in STOPS[way][1]:
                os.kill(pid, number)
                time.sleep(0.02)
            assert zygote.wait(pid) == 0, (way, trial)
            assert "twice" in way or {one.result() for one in loads} <= {0, 200, 429, 503}, way

ENDLESS = """
import torch, transcribe
passes, x = transcribe.recognise_batch, torch.ones(300, 300)
def recognise_batch(system, feats, hotwords=None):
    if len(feats[0]) == 120: print("endless", file=sys.stderr, flush=True)
    while len(feats[0]) == 120: x @ x
    return passes(system, feats, hotwords)
transcribe.recognise_batch = recognise_batch
"""

def test_sigterm_exits_0_while_the_model_runs_for_nobody(zygote, tmp_path):  # C59
    with own_process(zygote, tmp_path, ENDLESS) as (pid, _, server):
        assert exchange(server, post_json({"features": ROWS, "timeout": 0.3}))[0] == 504
        os.kill(pid, signal.SIGTERM)
        assert zygote.wait(pid) == 0        # and not -6: "terminate called without an active exception"

def test_a_second_signal_ends_at_once(zygote, tmp_path):  # C59
    with own_process(zygote, tmp_path, ENDLESS) as (pid, said, server), connected(server) as asked:
        asked.sendall(post_json({"features": ROWS}))
        read_until(said, "endless")
        os.kill(pid, signal.SIGINT)
        read_until(said, f" INFO drain seconds={9 * PATIENCE:g}")       # it waits for the answer
        os.kill(pid, signal.SIGTERM)
        read_until(said, 'name=SIGTERM message="the second one: ending at once"')
        assert zygote.wait(pid) == 0

@slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_process_of_a_container_stops_as_any_other(tmp_path, number):  # C59
    """It gets only the signals that it has a handler for."""
    apart = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if shutil.which("unshare") is None or subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("this machine allows no namespace of processes")
    with started(tmp_path, *apart, sys.executable, serve.__file__) as process:
        read_until(process.stderr, "listening on")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        os.kill(int(children), number)
        assert process.wait(PATIENCE) == 0

SLOW_STARTS = {"import": """
import runpy, sys, time
class Slow:
    def find_spec(self, name, path, target):
        if name == "torch": print("importing", file=sys.stderr, flush=True), time.sleep(600)
sys.meta_path.insert(0, Slow())
sys.argv[0] = "serve.py"
runpy.run_path("serve.py", run_name="__main__")
""", "load": """
import sys, time, serve
serve.load_warm = lambda options: time.sleep(600)
sys.exit(serve.main(sys.argv[1:]))
"""}

@pytest.mark.parametrize("stage, number", [("import", signal.SIGTERM), ("import", signal.SIGINT),
                                           ("load", signal.SIGINT)])
def test_a_signal_during_the_start_ends_at_once(tmp_path, stage, number):  # C59
    """While torch is imported, or while the model is loaded."""
    with started(tmp_path, sys.executable, "-c", SLOW_STARTS[stage]) as process:
        read_until(process.stderr, {"import": "importing", "load": " INFO loading host=127.0.0.1 port="}[stage])
        process.send_signal(number)
        assert process.wait(PATIENCE) == 0

def test_a_log_that_cannot_be_written_stops_nothing_and_comes_back(zygote, tmp_path):  # C193
    """Its file may not grow, from the start; then it may."""
    first = f"""
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 2**20))
told, failed, announce, write = open({str(tmp_path / "told")!r}, "w"), [], serve.announce, os.write
def tell(server, log):
    print(server.server_address[1], file=told, flush=True)
    announce(server, log)
def watched(*given):
    try:
        return write(*given)
    except OSError:
        failed.append(given)
        if len(failed) == 3:            # "loading", "listening" and "ready" are lost
            told.close()
        raise
serve.announce, os.write = tell, watched"""
    os.mkfifo(tmp_path / "told")
    argv = ["--ckpt", saved(serving_system(), tmp_path / "best.pt"), "--port=0"]
    pid = zygote.start(tmp_path / "log", *argv, script="serve", first=first)
    server = argparse.Namespace(server_address=("127.0.0.1", int((tmp_path / "told").read_text())))
    assert healthy(server) and healthy(server)
    assert (tmp_path / "log").read_bytes() == b""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (2**20, 2**20))
    assert healthy(server)
    os.kill(pid, signal.SIGTERM)
    assert zygote.wait(pid) == 0
    events = [line.split()[2:4] for line in (tmp_path / "log").read_text().splitlines()]
    assert events[0][0] == "log" and events[0][1].startswith("lost=")
    names = [name for name, *_ in events[1:]]
    assert "request" in names and [x for x in names if x != "request"] == ["signal", "drain", "stop"]

def metrics_of(server) -> dict[str, float]:
    samples = {}
    for line in exchange(server, get("GET /metrics HTTP/1.1"))[2].decode().splitlines():
        if not line.startswith("#"):
            label = r'[a-z]+="[^"]*"'
            match = re.fullmatch(rf"([a-z_]+(?:\{{{label}(?:,{label})*\}})?) ([0-9.e+-]+)", line)
            samples[match[1]] = float(match[2])
    return samples

def test_metrics_are_prometheus_text_that_adds_up(server):  # C60
    before, started = metrics_of(server)["asr_audio_seconds_total"], time.monotonic()
    assert exchange(server, post_json({"features": ROWS[:30]}))[0] == 200
    with Talker(server) as client:
        assert client.say({"audio_fs": 16000}, NOISE.tobytes())[-1]["is_final"]     # twice the model's rate
    wait_until(lambda: not server.phases)
    assert metrics_of(server)["asr_audio_seconds_total"] - before == pytest.approx(0.3 + 0.5625)
    told = re.findall(r"INFO socket id=\w+ seconds=(\d+\.\d) audio=0.6 code=1006 ", "\n".join(server.lines))
    assert float(told[-1]) <= time.monotonic() - started + 0.1
    exchange(server, get("GET /secret HTTP/1.1"))
    text = exchange(server, get("GET /metrics HTTP/1.1"))[2].decode()
    assert text.endswith("\n") and "/secret" not in text
    kinds = dict(line.split()[2:4] for line in text.splitlines() if line.startswith("# TYPE"))
    assert set(monitor.HELP) == set(kinds)
    samples = metrics_of(server)
    for label in ("", 'route="/transcribe",'):
        name = "asr_request_duration_seconds" if label else "asr_queue_seconds"
        assert (samples[f'{name}_bucket{{{label}le="+Inf"}}']
                == samples[f"{name}_count" + "{route=\"/transcribe\"}" * bool(label)] > 0)

def test_times_are_in_the_units_of_their_names_and_gauges_count_what_is_there(monkeypatch):  # C60
    """Two requests for a model that takes one at a time, and needs the 1,000 s that the clock jumps meanwhile."""
    jump, clock = [0.0], time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: clock() + jump[0])
    with holding(request_timeout=1e4, idle_timeout=1e4, header_timeout=1e4) as (server, held, pool), \
            contextlib.ExitStack() as kept:
        started = time.monotonic()
        for sent in (b"", b"GET /"):
            kept.enter_context(connected(server)).sendall(sent)
        second = pool.submit(exchange, server, post_json({"features": ROWS[:30]}))
        wait_until(lambda: sorted(server.phases.values()) == ["busy", "busy", "idle", "reading"])
        wait_until(lambda: server.batcher.waiting)
        now = metrics_of(server)
        jump[0] = 1000.0
        held.set()
        answers = [json.loads(one.result()[2]) for one in (server.first, second)]
        first, second = sorted((answer["timing"] for answer in answers), key=lambda timing: timing["queue_ms"])
        most = 1e3 * (time.monotonic() - started) + 1e3
        wait_until(lambda: len(server.lines) == 3)
        then = metrics_of(server)
    assert (now["asr_inflight_requests"], now["asr_connections"], now["asr_queue_depth"]) == (3, 5, 1)     # it is one
    assert abs(now["process_start_time_seconds"] - time.time()) < 9 * PATIENCE
    kilobytes = int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    assert now["process_resident_memory_bytes"] == pytest.approx(1024 * kilobytes, rel=0.3)
    for timing, slow, quick in ((first, "infer_ms", "queue_ms"), (second, "queue_ms", "infer_ms")):
        assert timing[quick] < 1e6 <= timing[slow] <= timing["total_ms"] < most
    logged = re.findall(r"path=/transcribe status=200 ms=([0-9.]+)", "\n".join(server.lines))
    assert len(logged) == 2 and all(1e6 <= float(ms) < most for ms in logged)
    for name in ("asr_queue_seconds", "asr_inference_seconds", 'asr_request_duration_seconds'):
        label = '{route="/transcribe"}' if "request" in name else ""
        assert then[f"{name}_count{label}"] == 2 and 1e3 <= then[f"{name}_sum{label}"] < 2e-3 * most
    assert then["asr_audio_seconds_total"] == pytest.approx(0.6)
    assert then["asr_tokens_total"] == sum(len(answer["tokens"]) for answer in answers) > 0

def test_recordings_on_many_connections_are_parsed_by_one_thread():
    """So that torch keeps its helper threads once, and not for each connection that has sent a recording."""
    raw = post("/transcribe", "audio/wav", wav(np.tile(NOISE, 15)))
    assert len(raw) < bodies.INTERRUPTIBLE
    helpers = lambda: len(os.listdir("/proc/self/task")) - threading.active_count()
    torch.set_num_threads(3)
    with serving() as server, contextlib.ExitStack() as kept:
        counts = [helpers()]
        for _ in range(5):
            connection = kept.enter_context(connected(server))
            connection.sendall(raw)
            assert read_answer(connection)[0].status == 200
            counts.append(helpers())
        wait_until(lambda: counts[0] < helpers() <= counts[1])      # a thread of before may still be ending

def test_recordings_do_not_wait_behind_large_json_and_waiting_counts():
    """A thread that is held plays a parser at work."""
    recording = post("/transcribe", "audio/wav", wav(np.tile(NOISE, 1 + bodies.INTERRUPTIBLE // NOISE.nbytes)))
    large = post_json(json.dumps({"features": ROWS}).encode().ljust(bodies.INTERRUPTIBLE))
    with serving() as server, concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert [server.conversions.acquire(False)
                for _ in range(os.cpu_count() + 1)] == [True] * os.cpu_count() + [False]
        held = threading.Event()
        try:
            server.large_json_parser.submit(held.wait)
            assert len(recording) > bodies.INTERRUPTIBLE and exchange(server, recording)[0] == 200
            waits = pool.submit(exchange, server, large)
            assert not concurrent.futures.wait([waits], 0.1).done
            server.parser.submit(held.wait)
            late = pool.submit(exchange, server, post_json({"features": ROWS, "timeout": 0.05}))
            wait_until(lambda: list(server.phases.values()).count("busy") == 2)
            time.sleep(0.1)         # its deadline counts from the request, not from its parsing
        finally:
            held.set()
        assert waits.result()[0] == 200 and check_error(*late.result()) == (504, "deadline_exceeded")
        with pytest.raises(web.ClientLeft):  # and what nobody waits for is not even parsed
            transcribe.enqueue(transcribe.Post(server, web.unread_head(), time.monotonic(), lambda: True), b"{")

def test_two_thousand_requests_leave_threads_descriptors_and_memory_as_they_were(server):
    def some(i: int) -> None:
        kinds = (post_json({"features": ROWS[:60]}), get(), post_json(b"{"), oai(FILE),
                 post("/transcribe", "audio/wav", wav(NOISE)), None)
        raw = kinds[i % 6]
        if raw is None:                 # aborted
            with connected(server) as connection:
                connection.sendall(post_json({"features": ROWS})[:-100])
        else:
            assert exchange(server, raw)[0] in (200, 400, 429)

    def burst(size: int) -> tuple[int, int, int]:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(some, range(size)))
        wait_until(lambda: not server.phases)
        return threading.active_count(), len(os.listdir("/proc/self/fd")), monitor.resident_bytes()

    sizes = (300, 1700) if os.environ.get("SLOW") else (48, 144)
    threads, files, memory = burst(sizes[0])
    _, files_after, memory_after = burst(sizes[1])
    wait_until(lambda: threading.active_count() <= threads)         # one ends a moment behind its connection
    assert files_after <= files and memory_after - memory < 48 * 2**20

def test_wrong_checkpoint_or_port_is_one_line_and_exit_2(ckpt, tmp_path, capsys, monkeypatch):  # C196
    bounds, switched = [], []                   # nor may this process keep what a server sets
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    monkeypatch.setattr(serve.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=lambda *given: bounds.append(given)))
    monkeypatch.setattr(serve, "catch_signals", os.pipe)
    monkeypatch.setattr(sys, "setswitchinterval", switched.append)
    (tmp_path / "bad.pt").write_bytes(b"not a checkpoint")
    for arguments in (["--checkpoint", str(tmp_path / "none.pt")], ["--ckpt", str(tmp_path / "bad.pt")]):
        refusal(capsys, *arguments, script=serve)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        wanted = f"serve.py: --host 127.0.0.1 --port {port}: Address already in use; --port 0 takes a free port\n"
        assert refusal(capsys, "--checkpoint", ckpt, "--port", port, script=serve) == wanted
    for host in ("no.such.host.invalid", "192.0.2.1", "a..b"):
        error = refusal(capsys, "--checkpoint", ckpt, "--host", host, script=serve)
        assert error.startswith(f"serve.py: --host {host}: no address of this machine: ")
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "16"
    assert set(bounds) == {(-8, 2)} and set(switched) == {0.0002}       # two heaps of glibc; seconds

# ---- sockets: the handshake, frames, messages ----

def client_frame(opcode: int, payload: bytes = b"", is_last: bool = True, mask: bytes | None = b"\1\2\3\4",
                 size: bytes | None = None) -> bytes:
    """A frame as a client sends it; mask None: not masked; size: the length, if not written as it should be."""
    n = len(payload)
    if size is None:
        size = (bytes([n]) if n < 126 else b"\x7e" + struct.pack(">H", n) if n < 65536
                else b"\x7f" + struct.pack(">Q", n))
    head = bytes([0x80 * is_last | opcode])
    if mask is None:
        return head + size + payload
    masked = (np.frombuffer(payload, np.uint8) ^ np.resize(np.frombuffer(mask, np.uint8), n)).tobytes()
    return head + bytes([size[0] | 0x80]) + size[1:] + mask + masked

ASKS = ("Upgrade: websocket", "Connection: keep-alive, Upgrade", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version: 13")

class Talker:
    """A client as FunASR's are."""

    def __init__(self, server, path: str = "/", *headers: str):
        self.connection = connected(server)
        self.connection.sendall(get(f"GET {path} HTTP/1.1", *(headers or ASKS)))
        self.file = self.connection.makefile("rb")
        self.status = int(self.file.readline().split()[1])
        self.headers = {}
        while line := self.file.readline().strip():
            name, _, value = line.decode().partition(": ")
            self.headers[name.lower()] = value

    def send(self, message: dict | str | bytes) -> None:
        if isinstance(message, bytes):
            self.connection.sendall(client_frame(2, message))
        else:
            text = message if isinstance(message, str) else json.dumps(message)
            self.connection.sendall(client_frame(1, text.encode()))

    def frame(self) -> tuple[int, bytes]:
        """The next frame of the server; (-1, b"") at the end of the connection."""
        with contextlib.suppress(ConnectionError):
            head = self.file.read(2)
            if len(head) == 2:
                assert head[0] & 0x80 and not head[1] & 0x80        # whole messages, never masked
                size = head[1]
                if size > 125:
                    size = int.from_bytes(self.file.read(2 if size == 126 else 8), "big")
                return head[0] & 0x0F, self.file.read(size)
        return -1, b""

    def read(self) -> dict:
        opcode, payload = self.frame()
        assert opcode == 1, (opcode, payload)
        return json.loads(payload, parse_constant=pytest.fail)

    def until_final(self) -> list[dict]:
        """Messages up to the one with is_final."""
        messages = [self.read()]
        while not messages[-1]["is_final"]:
            messages.append(self.read())
        return messages

    def say(self, settings: dict, data: bytes, size: int = 9600) -> list[dict]:
        """An utterance -> its messages."""
        self.send(settings)
        for start in range(0, len(data), size):
            self.send(data[start:start + size])
        self.send({"is_speaking": False})
        return self.until_final()

    def closed(self) -> int:
        """The code of the close frame that comes next, behind which the connection ends; -1 without one."""
        opcode, payload = self.frame()
        while opcode in (1, 10):
            opcode, payload = self.frame()
        assert opcode in (8, -1) and (opcode == -1 or self.frame()[0] == -1)
        return int.from_bytes(payload[:2], "big") if opcode == 8 else -1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()
        self.connection.close()

def test_handshake_and_frames_are_those_of_the_rfc():  # C201
    """Oracle: the examples of RFC 6455, 1.3 and 5.7; unmasking by a loop over bytes."""
    headers = dict(line.lower().split(": ") for line in ASKS) | {"sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ=="}
    assert dict(sockets.handshake(headers, "binary"))["Sec-WebSocket-Accept"] == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
    hello = bytes.fromhex("818537fa213d7f9f4d5158")
    assert sockets.parse_header(hello) == (True, 1, 5, hello[2:6], 6)
    assert sockets.unmask(hello[6:], hello[2:6]) == b"Hello" and client_frame(1, b"Hello", mask=hello[2:6]) == hello
    assert sockets.to_frame(1, b"Hello").hex() == "810548656c6c6f"
    assert [sockets.to_frame(2, bytes(n))[:4].hex() for n in (125, 126, 256, 65535, 65536)] == [
        "827d0000", "827e007e", "827e0100", "827effff", "827f0000"]
    assert sockets.to_frame(2, bytes(65536))[:11].hex() == "827f000000000001000000"
    for opcode in (8, 9, 10):       # 125 bytes are the most of these
        assert sockets.parse_header(client_frame(opcode, bytes(125))).size == 125
        for refused in (client_frame(opcode, bytes(126)), client_frame(opcode, b"", is_last=False)):
            with pytest.raises(sockets.Closed, match="control frames have at most 125 bytes"):
                sockets.parse_header(refused)
    with pytest.raises(sockets.Closed, match="must be masked"):
        sockets.parse_header(client_frame(1, b"a", mask=None) + bytes(9))
    assert not sockets.is_upgrade({"upgrade": "websocket"}) and not sockets.is_upgrade({"connection": "upgrade"})
    spaced = headers | {"sec-websocket-key": "dGhlIHNhbXBsZSBub25j ZQ=="}
    assert sockets.why_no_handshake(headers) == "" and "wanted 16 bytes" in sockets.why_no_handshake(spaced)
    for text in ("hello", "hello!"):        # of 5 bytes at most
        wire = io.BytesIO(client_frame(1, text.encode()))
        client = sockets.Socket(SimpleNamespace(buffer=wire.getvalue(), take=wire.read), 5, 1.0, 1.0)
        with contextlib.nullcontext() if len(text) == 5 else pytest.raises(sockets.Closed, match="more than 5 bytes"):
            assert client.read() == text
    for n in (0, 1, 3, 4, 1001):
        data = random.Random(n).randbytes(n)
        assert sockets.unmask(data, b"abcd") == bytes(byte ^ b"abcd"[i % 4] for i, byte in enumerate(data))
    for cut in range(len(hello) - 5):
        assert sockets.parse_header(hello[:cut]) is None
    for n, written in ((126, b"\x7e\0\x7e"), (65535, b"\x7e\xff\xff"), (65536, b"\x7f" + (65536).to_bytes(8, "big"))):
        assert sockets.parse_header(client_frame(2, b"", size=written)).size == n
    for written in (b"\x7e\0\x7d", b"\x7f" + (65535).to_bytes(8, "big"), b"\x7f" + (2**63).to_bytes(8, "big")):
        with pytest.raises(sockets.Closed, match="fewest bytes"):
            sockets.parse_header(client_frame(2, b"", size=written))
    for code in (1000, 1003, 1007, 1014, 3000, 4999):
        assert sockets.parse_close(struct.pack(">H", code) + b"bye").code == code
    for code in (0, 999, 1004, 1005, 1006, 1015, 2999, 5000):
        with pytest.raises(sockets.Closed, match="a code that none may have"):
            sockets.parse_close(struct.pack(">H", code))

REFUSED_FRAMES = {  # by the code of the close frame: what is sent
    1002: {"not masked": client_frame(1, b"{}", mask=None), "first reserved bit": client_frame(0x41, b"{}"),
           "second reserved bit": client_frame(0x21, b"{}"), "third reserved bit": client_frame(0x12, b"{}"),
           "unknown opcode": client_frame(3, b"{}"), "unknown control": client_frame(11),
           "control in fragments": client_frame(9, b"", is_last=False), "long control": client_frame(9, bytes(126)),
           "goes on without a beginning": client_frame(0, b"{}"),
           "begins within another": client_frame(1, b"{", is_last=False) + client_frame(2, b"a"),
           "length in too many bytes": client_frame(2, bytes(5), size=b"\x7e\0\5"),
           "close of one byte": client_frame(8, b"a"), "close with 1005": client_frame(8, b"\x03\xed")},
    1007: {"text that is no UTF-8": client_frame(1, b"\xff"), "close that is none": client_frame(8, b"\x03\xe8\xff")},
    1008: {"pings that flood": client_frame(9) * 3000,
           "fragments without data": client_frame(2, b"", False) + client_frame(0, b"", False) * 3000},
    1009: {"huge length": client_frame(2, b"", size=b"\x7f" + (2**62).to_bytes(8, "big")),
           "above the limit": client_frame(1, b"a" * (2**20 + 1)),
           "fragments that never end": client_frame(2, b"", False) + client_frame(0, bytes(50000), False) * 30}}

@pytest.mark.parametrize("code, name", [(code, name) for code, sent in REFUSED_FRAMES.items() for name in sent])
def test_what_no_client_may_send_closes_its_socket_with_a_code(server, monkeypatch, code, name):  # C202
    now = time.monotonic()
    monkeypatch.setattr(sockets, "time", SimpleNamespace(monotonic=lambda: now))       # all of it in one second
    with Talker(server) as client:
        with contextlib.suppress(ConnectionError):
            client.connection.sendall(REFUSED_FRAMES[code][name])
        assert client.closed() == code
    assert exchange(server, get())[0] == 200

def test_a_second_has_1000_frames_without_data_at_most_and_a_reason_120_characters(monkeypatch):  # C202
    sent, now = [], 10.0
    monkeypatch.setattr(sockets, "time", SimpleNamespace(monotonic=lambda: now))
    client = sockets.Socket(SimpleNamespace(write=sent.append), 9, 1.0, 1.0)
    for now in (10.0, 11.001, 12.002):
        for _ in range(1000):
            client.count_empty()
    now = 13.0
    with pytest.raises(sockets.Closed) as closed:
        client.count_empty()
    client.close(sockets.Closed(closed.value.code, "é" * 200))
    assert sent == [b"\x88\x7a\x03\xf0" + b"?" * 120]      # 1008

def test_pings_fragments_and_closing_are_answered(server, monkeypatch):  # C202
    """A message in fragments, a ping between them; a close with and without a code, and one in pieces."""
    rests = []
    monkeypatch.setattr(web.Connection, "read_away", lambda self, seconds: rests.append(seconds))
    sent = (client_frame(1, b'{"is_spea', False) + client_frame(9, b"abc") + client_frame(0, b"", False)
            + client_frame(10, b"not asked for") + client_frame(0, b'king": false}'))
    for end, code in ((struct.pack(">H", 1000) + b"bye", 1000), (struct.pack(">H", 4999), 4999), (b"", None)):
        with Talker(server) as client:
            for i in range(0, len(sent), 7 if code == 1000 else 1000):
                client.connection.sendall(sent[i:i + (7 if code == 1000 else 1000)])
            assert client.frame() == (10, b"abc")
            assert client.read()["is_final"]
            client.connection.sendall(client_frame(8, end))
            opcode, payload = client.frame()
            assert opcode == 8 and payload[:2] == end[:2] and client.frame()[0] == -1
    assert rests == [1.0] * 3       # s that a client has to read a close
    with Talker(server) as client:      # beside a message that is as long as may be
        client.connection.sendall(client_frame(1, bytes(2**20), False) + client_frame(9, bytes(125)))
        assert client.frame() == (10, bytes(125))

def test_the_handshake_is_checked():  # C201
    def without(name: str, *more: str) -> list[str]:
        return [line for line in ASKS if not line.startswith(name)] + list(more)

    with serving(cors_origin=["https://other.example"]) as server:
        refused = {"version": (400, without("Sec-WebSocket-Version", "Sec-WebSocket-Version: 8")),
                   "no version": (400, without("Sec-WebSocket-Version")), "no key": (400, without("Sec-WebSocket-Key")),
                   "short key": (400, without("Sec-WebSocket-Key", "Sec-WebSocket-Key: YWJj")),
                   "body": (400, [*ASKS, "Content-Length: 5"]), "chunks": (400, [*ASKS, "Transfer-Encoding: chunked"]),
                   "close": (400, without("Connection", "Connection: close, Upgrade")),
                   "origin": (403, [*ASKS, "Origin: http://evil.example"]), "null": (403, [*ASKS, "Origin: null"]),
                   "port": (403, [*ASKS, "Origin: http://x:81"])}
        for name, (status, headers) in refused.items():
            assert check_error(*exchange(server, get("GET /ws HTTP/1.1", *headers)))[0] == status, name
        assert exchange(server, get("GET /ws HTTP/1.1", *refused["version"][1]))[1]["sec-websocket-version"] == "13"
        for headers in (without("Upgrade"), without("Connection")):
            assert check_error(*exchange(server, get("GET /ws HTTP/1.1", *headers))) == (426, "upgrade_required")
            assert exchange(server, get("GET / HTTP/1.1", *headers))[1]["content-type"].startswith("text/html")
        others = ("HEAD /ws HTTP/1.1", 426), ("GET /health HTTP/1.1", 200)      # whatever headers they have
        assert all(exchange(server, get(line, *ASKS))[0] == status for line, status in others)
        for origin in ("http://x", "https://X:443", "https://other.example"):
            with Talker(server, "/ws", *ASKS, f"Origin: {origin}", "Sec-WebSocket-Protocol: chat, binary") as client:
                assert client.status == 101 and client.headers["sec-websocket-protocol"] == "binary"
        with Talker(server, "/") as client:
            assert client.status == 101
            assert not {"sec-websocket-protocol", "content-type", "content-length"} & set(client.headers)

def test_the_key_is_wanted_in_the_handshake_as_header_or_in_the_address(monkeypatch):  # C201
    monkeypatch.setenv("ASR_API_KEY", "secret")
    with serving() as server:
        for path, headers, status in (("/", [], 401), ("/?key=wrong", [], 401), ("/ws?key=secret", [], 101),
                                      ("/ws", ["Authorization: Bearer secret"], 101)):
            with Talker(server, path, *ASKS, *headers) as client:
                assert client.status == status
        assert exchange(server, post_json({"features": ROWS[:30]}, "/transcribe?key=secret"))[0] == 401
    assert not any("secret" in line for line in server.lines)

# ---- downloads: names, and paths that hold no model ----

def kit_copy(variant: str, folder: Path, *left_out: str) -> Path:
    shutil.copytree(kit(variant), folder, ignore=shutil.ignore_patterns("expected", *left_out))
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755)
    return folder

TAKE = ("take paraformer-zh: modelscope download --model iic/speech_seaco_paraformer_large_asr_nat-zh-cn-16k-common-"
        "vocab8404-pytorch --local_dir paraformer-zh  or  hf download funasr/paraformer-zh --local-dir paraformer-zh")

@needs_kit
@pytest.mark.parametrize("found, error", [
    ({"model.pt": "version https://git-lfs.github.com/spec/v1\noid sha256:3d49\nsize 880502012\n"},
     "model.pt: a pointer, not the weights of 880,502,012 bytes: git lfs pull in "),
    ({"model.pt": "PK\3\4, and no more"}, "half a download? Its config asks for 1,119,340 bytes at least, it has "),
    ({"model.onnx": "", "model_quant.onnx": ""}, "wanted model.pt, got an ONNX export (model.onnx, model_quant.onnx), "
     f"which onnxruntime runs and PyTorch does not; {TAKE}"),
    ({".cache/huggingface/download/xyz.incomplete": ""},
     "wanted model.pt, got a download that has not finished (.cache/huggingface/download/xyz.incomplete)"),
    ({"model.pt": "", "config.yaml": "model: SenseVoiceSmall\nmodel_conf:\n  sos: 1\n"},
     "model SenseVoiceSmall: wanted a recogniser that runs here, got FunASR's SenseVoiceSmall, which recognises five "
     f"languages with an encoder alone; {TAKE}"),
    (KIT / "vad", "got FunASR's fsmn-vad, which finds where somebody speaks and goes with --vad; take"),
    (KIT / "punc", "got FunASR's ct-punc, which puts marks into text and goes with --punctuate; take"),
    (KIT / "sanm/model.pt", f"got its weights alone: pass the folder, {KIT / 'sanm'}"),
    ("paraformer-zh", "paraformer-zh: wanted a path, got FunASR's name of a model (989 MB); download it with " +
     TAKE.partition(": ")[2] + ", and pass paraformer-zh\n"),
    ("funasr/paraformer-zh", "and pass paraformer-zh\n"),
    ("damo/speech_paraformer-large-contextual_asr_nat-zh-cn-16k-common-vocab8404",
     "(912 MB); download it with modelscope download --model iic/speech_paraformer-large-contextual_asr"),
    ("iic/SenseVoiceSmall",
     f"FunASR's SenseVoiceSmall, which recognises five languages with an encoder alone; {TAKE}\n"),
    ("paraformer-zh-streaming",
     "(880 MB); download it with modelscope download --model iic/speech_paraformer-large_asr_nat-zh-cn-16k-common-"
     "vocab8404-online --local_dir paraformer-zh-streaming  or  hf download "),
    ("cam++", "FunASR's cam++, which tells speakers apart and writes no text; take paraformer-zh"),
    ("paraformer-zhx",
     "wanted a checkpoint, which python train.py CONFIG makes, or a directory of FunASR's, got no such file")])
def test_a_path_that_holds_no_model_says_what_it_is_and_what_to_do(tmp_path, monkeypatch, capsys, found, error):  # C154
    """found: the files of a kit that are others, without its weights; or another path, or a name of FunASR's."""
    monkeypatch.chdir(tmp_path)
    if isinstance(found, dict):
        kit_copy("sanm", tmp_path / "model", "model.pt")
        for name, content in found.items():
            (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "model" / name).write_text(content)
        found = "model"
    assert error in refusal(capsys, "--ckpt", found, "a.wav")

def test_every_published_model_is_known_by_all_its_names_unless_a_path_has_them(tmp_path, monkeypatch):  # C154
    """Sizes and names are those of FunASR's model list."""
    monkeypatch.chdir(tmp_path)
    for model in downloads.DOWNLOADS:
        names = {model.name, model.huggingface, model.modelscope, Path(model.modelscope).name,
                 model.modelscope.upper() + "/"}
        for name in names - {""}:
            error = message_of(downloads.check_name, name)
            assert error.endswith(f", and pass {model.name or 'paraformer'}")
            assert ("  or  hf download " in error) == bool(model.huggingface)
    (tmp_path / "paraformer-zh").mkdir()
    for path in ("", "paraformer-zh"):
        downloads.check_name(path)
    for kind in ("SenseVoiceSmall FsmnVADStreaming CTTransformer CTTransformerStreaming MonotonicAligner "
                 "CAMPPlus").split():
        refused("wanted a recogniser that runs here", downloads.check_kind, kind, "config.yaml")
    (tmp_path / "._____temp").mkdir()       # where modelscope's client writes what has not come whole
    refused("has not finished", downloads.check_files, tmp_path, {"model": tmp_path / "model.pt"})
    assert [model.megabytes for model in downloads.DOWNLOADS] == [989, 881, 900, 912, 887, 880]
    found = [model.huggingface for model in (*downloads.DOWNLOADS, *downloads.PARTS.values()) if model.huggingface]
    assert found == [f"funasr/{name}"
                     for name in "paraformer-zh paraformer-en paraformer-zh-streaming fsmn-vad ct-punc".split()]

# ---- commandline: how threads wait ----

@pytest.mark.parametrize("given, count", [
    ({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)])
def test_idle_threads_spin_briefly_unless_the_user_says_how_they_wait(monkeypatch, given, count):
    monkeypatch.setattr(os, "environ", dict(given))
    commandline.spin_briefly()
    assert os.environ.get("GOMP_SPINCOUNT") == count

@pytest.mark.parametrize("name", ["bench", "decode", "punctuation", "serve", "train", "vad"])
def test_scripts_say_how_threads_wait_before_torch_is_loaded(name):
    before, _, after = (HERE / f"{name}.py").read_text().partition('if __name__ == "__main__":')
    roots = {line.split()[1].split(".")[0] for line in before.split("\n") if line.startswith(("import ", "from "))}
    assert roots <= {"commandline", *sys.stdlib_module_names} and "    spin_briefly()" in after.split("\nimport ")[0]

# ---- survival: consoles, signals ----

@pytest.mark.parametrize("encoding, shown", [
    ("cp1252", "\xe9?"), ("cp437", "\xe9?"), ("ascii", "??"), ("utf-8", "\xe9\u4f60")])
def test_what_a_console_cannot_show_is_replaced(encoding, shown):  # C181
    raw = io.BytesIO()
    stream = survival.SafeStream(io.TextIOWrapper(raw, encoding=encoding))
    print("\xe9\u4f60", file=stream, end="", flush=True)
    assert raw.getvalue().decode(encoding) == shown and not stream.error

def test_a_stream_that_fails_says_why_once_and_takes_everything_after():  # C181
    read_end, write_end = os.pipe()
    os.close(read_end)
    for target, words in ((os.open("/dev/full", os.O_WRONLY), "No space left"), (write_end, "Broken pipe")):
        with open(target, "w") as file:
            stream = survival.SafeStream(file)
            for _ in range(3):
                print("x" * 10000, file=stream, flush=True)
            assert words in stream.error

@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_a_closed_stream_is_opened_on_nothing_so_that_no_file_takes_its_place(tmp_path, closed):  # C181
    program = ("import os, sys, survival; survival.keep_streams(); file = os.open('said', os.O_CREAT | os.O_WRONLY); "
               "os.write(file, f'{file > 2} {sys.stdout.error}'.encode()); "
               "import warnings; assert warnings.formatwarning('a', UserWarning, 'b', 3) == 'warning: a' + chr(10)")
    subprocess.run(["bash", "-c", f"{sys.executable} -c \"{program}\" {closed}"], cwd=tmp_path, check=True,
                   timeout=PATIENCE, env={**os.environ, "PYTHONPATH": str(HERE)})
    assert (tmp_path / "said").read_text() == f"True {'it is closed' if closed == '>&-' else ''}"

def test_a_second_signal_ends_at_once_what_the_first_asks_to_stop():  # C84
    lines = ["import os, survival, time", "stop = survival.catch_signals()"]
    for _ in range(2):
        lines += ["os.kill(os.getpid(), 2)", "print(stop.is_set(), flush=True)"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=HERE,
                          capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "True\n")

def test_a_lock_released_meanwhile_is_taken_anew_and_one_that_cannot_be_is_none(tmp_path, monkeypatch):  # C182
    path, real = tmp_path / "x.lock", survival.fcntl.lockf
    meanwhile = [path.unlink]  # what another process does
    monkeypatch.setattr(survival.fcntl, "lockf", lambda file, how: (meanwhile and meanwhile.pop()(), real(file, how)))
    held = survival.lock(path, "x: wanted a file")
    assert not meanwhile and path.read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
    survival.release(held)
    assert held.closed and not path.exists()
    monkeypatch.setattr(survival.fcntl, "lockf", lambda file, how: os.open(path / "x", 0))  # fails, as without locks
    survival.release(survival.lock(path, "x: wanted a file"))
    assert not path.exists()

def test_a_signal_that_is_held_back_comes_at_the_end_and_a_second_one_at_once():  # C120
    for number, kind in ((signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, survival.Ended)):
        for times, reached in ((1, ["in", "end"]), (2, ["in"])):
            seen = []
            survival.end_as_ctrl_c()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with pytest.raises(kind) as caught:
                with survival.interrupted_later():
                    os.kill(os.getpid(), number)
                    seen.append("in")
                    if times == 2:
                        os.kill(os.getpid(), number)
                    seen.append("end")
            assert seen == reached and survival.exit_code(caught.value) == 128 + number
    for before, after in ((signal.SIG_IGN, signal.SIG_IGN), (signal.SIG_DFL, survival.raise_ended)):  # under nohup, not
        signal.signal(signal.SIGHUP, before)
        survival.end_as_ctrl_c()
        assert signal.getsignal(signal.SIGHUP) is after

def loader_process(pipe) -> None:
    survival.leave_signals_to_parent(0)
    pipe.send(None)
    while True:
        pipe.send(pipe.recv())

def test_a_loader_process_leaves_signals_to_its_parent_and_ends_when_that_sends_one():  # C84
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=loader_process, args=(theirs,), daemon=True)
    process.start()
    ours.recv()
    for name in ("INT", "TERM", "HUP"):
        subprocess.run(["kill", f"-{name}", str(process.pid)], check=True)  # of another process than the parent
        ours.send(name)
        assert ours.recv() == name
    process.terminate()
    process.join(PATIENCE)
    assert process.exitcode == 0

# ---- augment: noise, masks, channels ----

def test_noise_is_as_loud_as_drawn_and_between_white_and_dull():
    samples = torch.from_numpy(tone(1.0, 8000)).float()
    ratios, colours = [], []
    for index in range(60):
        noisy = augment.add_noise(samples, (5.0, 25.0), data.generator(0, 1, index))
        assert torch.equal(noisy, augment.add_noise(samples, (5.0, 25.0), data.generator(0, 1, index)))
        noise = (noisy - samples).double()
        ratios.append(10 * math.log10(samples.double().square().mean() / noise.square().mean()))
        colours.append(float((noise[1:] * noise[:-1]).mean() / noise.square().mean()))
    assert 5 <= min(ratios) < 7 and 23 < max(ratios) <= 25
    assert -0.05 < min(colours) < 0.1 and 0.4 < max(colours) < 0.55        # of neighbours: 0 white, 0.5 their mean
    assert torch.equal(augment.add_noise(torch.zeros(50), (0.0, 0.0), data.generator(0, 0, 0)), torch.zeros(50))
    shifted = augment.add_noise(samples + 0.5, (5.0, 25.0), data.generator(0, 1, 59)) - 0.5
    torch.testing.assert_close(shifted, noisy, rtol=0, atol=1e-5)

def test_spec_augment_zeroes_spans_within_their_bounds_and_nothing_else():
    """Ones in: what comes out 0 must be the union of whole frames and of bins repeated in both stacked blocks."""
    options, widest_bins, widest_frames = data_options(), 0, 0
    for index in range(300):
        feats = torch.ones(30, 40)
        out = augment.spec_augment(feats, options, data.generator(0, 1, index))
        frames, bins = (out == 0).all(1), (out == 0).all(0)
        assert torch.equal(out, 1 - (frames[:, None] | bins).float()) and torch.equal(bins[:20], bins[20:])
        assert (feats == 1).all()
        widest_bins, widest_frames = max(widest_bins, int(bins[:20].sum())), max(widest_frames, int(frames.sum()))
        assert torch.equal(out, augment.spec_augment(feats, options, data.generator(0, 1, index)))
    assert 5 < widest_bins <= 10 and 4 < widest_frames <= 8         # two masks each, of up to 5 bins and 4 frames
    options.augment.time_share = 0.04                               # of 30 frames: one
    assert max(int((augment.spec_augment(torch.ones(30, 40), options, data.generator(0, 0, i)) == 0).all(1).sum())
               for i in range(100)) == 2
    lowest, highest = SimpleNamespace(integers=lambda n: 0), SimpleNamespace(integers=lambda n: n - 1)
    assert augment.mask_span(5, 3, highest).tolist() == [True, True, False, False, False]
    assert augment.mask_span(2, 3, highest).tolist() == [False, False] and augment.mask_span(2, 3, lowest).all()

def test_a_random_channel_is_one_smooth_curve_for_all_frames_and_blocks():
    options = data_options()
    options.augment.freq_masks = options.augment.time_masks = 0
    options.augment.channel_std = 0.3
    feats = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    augmented = torch.stack([augment.spec_augment(feats, options, data.generator(0, 1, i)) for i in range(400)])
    curves = (augmented - feats).double()
    assert (curves - curves[:, :1, :20].repeat(1, 1, 2)).abs().max() < 1e-5
    curves = curves[:, 0, :20]
    cosines = torch.cos(torch.arange(20)[:, None] * torch.pi * (torch.arange(20) + 0.5) / 20)  # orthogonal on the bins
    strengths = curves @ cosines.T.double() / cosines.square().sum(1)
    assert strengths[:, 4:].abs().max() < 1e-5
    np.testing.assert_allclose(strengths[:, :4].std(0), 0.3, rtol=0.15)
    assert strengths[:, :4].mean(0).abs().max() < 0.1

@pytest.mark.parametrize("N, M, direct", [(300, 77, 5), (40, 90, 60), (50, 1, 0)])
def test_a_room_is_the_direct_sum_with_the_energy_and_the_times_of_the_speech(N, M, direct):
    rng = np.random.default_rng(N)
    samples, response = rng.normal(size=N), rng.normal(size=M)
    response[direct] = 9.0
    heard = np.zeros(N)
    for n in range(N):
        for m in range(M):
            if 0 <= n + direct - m < N:
                heard[n] += response[m] * samples[n + direct - m]
    heard *= math.sqrt((samples ** 2).sum() / (heard ** 2).sum())
    found = augment.reverberate(torch.from_numpy(samples), torch.from_numpy(response))
    np.testing.assert_allclose(found, heard, rtol=0, atol=1e-10)
    assert torch.equal(augment.reverberate(torch.zeros(N), torch.ones(M)), torch.zeros(N))

def test_a_recorded_noise_is_as_loud_as_said_and_repeated_or_cut():
    samples = torch.from_numpy(tone(0.1, 8000)).float() + 0.5
    noise = torch.randn(300, generator=torch.Generator().manual_seed(0))
    for given in (noise, noise.repeat(9)):
        added = (augment.mix(samples, given, 10.0) - samples).double()
        expected = noise.repeat(3)[:800].double()
        torch.testing.assert_close(added, expected * (added.norm() / expected.norm()), rtol=0, atol=1e-6)
        assert abs(10 * math.log10(0.3 ** 2 / 2 / added.square().mean()) - 10) < 0.01
    assert torch.equal(augment.mix(samples, torch.zeros(7), 10.0), samples)

def surrounded(folder: Path, **changes) -> SimpleNamespace:
    """Options of a dataset with one noise, shorter than every utterance, at 10 dB, and one room of 200 samples."""
    rng = np.random.default_rng(0)
    audio.save_wav(folder / "noise.wav", 0.1 * rng.normal(size=1000), 8000)
    audio.save_wav(folder / "room.wav", 0.2 * rng.normal(size=200), 8000)
    options = data_options()
    noise, room = (str(write_manifest(folder / f"{x}.jsonl", [{"audio": f"{x}.wav"}])) for x in ("noise", "room"))
    vars(options.augment).update({**dict(speeds=(1.0,), freq_masks=0, time_masks=0, snr_db=(10.0, 10.0), noise=noise,
                                         reverb=room, reverb_share=1.0), **changes})
    return options

def opened(path: Path, options: SimpleNamespace, seed: int = 0) -> data.ManifestDataset:
    return data.ManifestDataset(path, options, letters, seed, True, data.open_surroundings(options.augment))

def test_an_item_stands_in_its_room_and_noise_as_they_are_without_them_as_drawn_by_hand(tmp_path):
    options = surrounded(tmp_path)
    path = recordings(tmp_path, 6)
    for index in range(6):
        samples, rate_hz = audio.load_wav(tmp_path / f"r{index}.wav")
        samples = audio.resample(samples, rate_hz, 8000)
        room, noise = (audio.load_wav(tmp_path / f"{name}.wav")[0] for name in ("room", "noise"))
        heard = augment.mix(augment.reverberate(samples, room), noise, 10.0)
        torch.testing.assert_close(opened(path, options)[3, index].feats, audio.frontend(heard, 8000, options))
        bare = surrounded(tmp_path, noise="", reverb="", snr_db=(5.0, 30.0))
        rng = data.generator(0, 3, index)
        rng.integers(1)
        noisy = augment.add_noise(samples, (5.0, 30.0), rng)
        assert torch.equal(opened(path, bare)[3, index].feats, audio.frontend(noisy, 8000, bare))

def test_rooms_and_noises_are_drawn_by_seed_epoch_and_key(tmp_path):  # C16
    """One recording under nine keys; then, without noise, half of them in the room."""
    options = surrounded(tmp_path, snr_db=(0.0, 30.0), reverb_share=0.5)
    audio.save_wav(tmp_path / "noise.wav", 0.1 * np.random.default_rng(1).normal(size=90000), 16000)
    audio.save_wav(tmp_path / "r.wav", tone(0.5, 8000), 8000)
    rows = [{"audio": "r.wav", "text": "a", "key": f"k{i}"} for i in range(9)]
    there, back = (write_manifest(tmp_path / f"{i}.jsonl", rows[::step]) for i, step in ((1, 1), (2, -1)))
    feats = [opened(there, options)[2, i].feats for i in range(9)]
    for i in range(9):
        assert torch.equal(opened(back, options)[2, 8 - i].feats, feats[i])
        assert not any(torch.equal(feats[i], other) for other in (
            feats[i - 1], opened(there, options)[3, i].feats, opened(there, options, seed=1)[2, i].feats))
    vars(options.augment).update(noise="", snr_db=())
    dry = audio.frontend(torch.from_numpy(tone(0.5, 8000)).float(), 8000, options)
    wet = [(opened(there, options)[epoch, i].feats - dry).abs().max() > 0.1 for epoch in range(20) for i in range(9)]
    assert 60 < sum(wet) < 120

def test_a_noise_is_read_from_any_place_and_at_the_rate_asked_for(tmp_path):
    """The values of a ramp say which samples were read: 100 of 300; no more than there are; twice as many at 16 kHz."""
    audio.save_wav(tmp_path / "ramp.wav", np.arange(300) / 1000, 8000)
    row, rng = manifests.Row("a", str(tmp_path / "ramp.wav"), "", None), np.random.default_rng(0)
    found = [data.read_noise(row, 100 / 8000, 8000, rng) for _ in range(300)]
    starts = [round(float(x[0]) * 1000) for x in found]
    assert all(len(x) == 100 and abs(float(x[-1] - x[0]) - 0.099) < 1e-3 for x in found)
    assert min(starts) <= 5 and max(starts) >= 195 and max(starts) <= 200
    assert len(data.read_noise(row, 9.0, 8000, rng)) == 300 and len(data.read_noise(row, 9.0, 16000, rng)) == 600

def test_recordings_for_augmentation_that_cannot_be_read_are_named(tmp_path, capsys):
    options = surrounded(tmp_path)
    path = recordings(tmp_path, 2)
    audio.save_wav(tmp_path / "empty.wav", np.zeros(0), 8000)
    audio.save_wav(tmp_path / "silence.wav", np.zeros(800), 8000)
    audio.save_wav(tmp_path / "long.wav", np.ones(80001), 8000)
    audio.save_wav(tmp_path / "longest.wav", np.ones(80000), 8000)
    assert len(data.read_response(manifests.Row("a", str(tmp_path / "longest.wav"), "", None), 8000)) == 80000
    for field, name, reason in (
            ("noise", "gone", f"missing: {tmp_path}/gone.wav"), ("noise", "empty", "wanted samples, got none"),
            ("reverb", "gone", f"missing: {tmp_path}/gone.wav"), ("reverb", "silence", "impulse response, got silence"),
            ("reverb", "long", "impulse response of at most 10 s, got 10.000"), ("reverb", "empty", "got silence")):
        manifest = write_manifest(tmp_path / "bad.jsonl", [{"audio": f"{name}.wav"}, {"audio": "room.wav"}])
        setattr(options.augment, field, str(manifest))
        line, = dry_run.surroundings_warnings(data.open_surroundings(options.augment), 8000)
        assert line.startswith(f"data.augment.{field}: ") and "got 1 of 2" in line and reason in line
        write_manifest(tmp_path / "bad.jsonl", [{"audio": f"{name}.wav"}])
        assert reason in opened(path, options)[1].reason
        options = surrounded(tmp_path)
    assert list(dry_run.surroundings_warnings(data.open_surroundings(options.augment), 8000)) == []
    write_manifest(tmp_path / "e.jsonl", [])
    for field in ("noise", "reverb"):
        for name, wanted in (("none", "wanted a text file"), ("e", "wanted recordings, got none")):
            place = f"{tmp_path}/{name}.jsonl"
            options = surrounded(tmp_path, **{field: place})
            options.kind, options.train = "manifest", str(path)
            refused(f"^data.augment.{field}: .*{wanted}", data.open_dataset, options, "train", letters, augment=True)
            assert len(data.open_dataset(options, "train", letters)) == 2   # what does not augment needs none

# ---- data: toy ----

def test_the_toy_task_is_the_one_that_figures_are_of():
    """A number of this code: another task would make the figures of README another's."""
    feats = data.ToySeq2SeqDataset(3, data_options(num_mels=80), letters)[2].feats
    assert feats.double().square().sum().item() == pytest.approx(11433.504, rel=1e-5)
    assert [data.toy_letter(symbol) for symbol in (0, 25, 26, 27)] == ["a", "z", "一", "丁"]

def test_toy_symbol_pairs_are_time_reversals_and_differ_from_all_others():
    table = data.toy_inventory(26, 80)
    np.testing.assert_array_equal(table[0::2], table[1::2, ::-1])
    gaps = [np.square(a - b).mean() for a, b in itertools.combinations(table, 2)]
    assert min(gaps) > 0.1
    np.testing.assert_array_equal(table[:6], data.toy_inventory(6, 80))         # independent of how many are asked for

def test_toy_features_are_the_trajectories_between_true_boundaries():
    """Without noise, gain and tilt: frame t of a symbol is its trajectory there; half and half at a boundary."""
    options = data_options(num_mels=80)
    options.toy.noise = options.toy.gain_std = options.toy.tilt_std = 0.0
    table = data.toy_inventory(26, 80)
    for u in [data.ToySeq2SeqDataset(20, options, letters)[i] for i in range(20)]:
        edges = u.boundaries.long().tolist()
        assert edges[0] == 0 and edges[-1] == len(u.feats) and len(edges) == len(u.text) + 1
        for symbol, start, end in zip(u.tokens.tolist(), edges, edges[1:]):
            for t in range(start + 1, end - 1):                     # blend_frames is 2: one frame on either side
                step = round((t + 0.5 - start) / (end - start) * 63)
                np.testing.assert_allclose(u.feats[t], table[symbol, step], atol=1e-5)
        a, b = u.tokens[:2].tolist()
        mix = 0.75 * table[b, round(0.5 / (edges[2] - edges[1]) * 63)] + 0.25 * table[a, 63]
        np.testing.assert_allclose(u.feats[edges[1]], mix, atol=1e-5)       # half a frame after the boundary

def test_toy_utterances_keep_their_promises():  # C17
    options = data_options(num_mels=80)
    dataset = data.ToySeq2SeqDataset(300, options, letters, seed=5)
    repeats, sizes = 0, set()
    for i, u in enumerate(dataset):
        durations = u.boundaries.diff()
        assert durations.max() >= 3 * durations.min() and 6 <= durations.min() and durations.max() <= 20
        sizes.add(len(u.text))
        assert u.tokens.tolist() == letters(u.text)
        assert len(u.feats) == dataset.lengths()[i]
        repeats += sum(a == b for a, b in zip(u.text, u.text[1:]))
    assert i == 299 and repeats > 10                                # about 300 * 6.5 / 26
    assert sizes == set(range(3, 13))                               # min_symbols to max_symbols, both included
    again = data.ToySeq2SeqDataset(10**9, options, letters, seed=5)
    for i in (299, 0, 123_456_789):
        assert torch.equal(again[i].feats, again[7, i].feats)
    assert torch.equal(again[299].feats, u.feats) and not torch.equal(again[298].feats[:5], u.feats[:5])
    levels = torch.stack([item.feats.mean() for item in (dataset[i] for i in range(200))])
    assert 0.3 < levels.std() < 0.8                                 # gain_std 0.5 and what the symbols add
    options.toy.min_symbols, options.toy.max_symbols = 1, 2
    few = [u.boundaries.diff() for u in data.ToySeq2SeqDataset(30, options, letters)]
    assert {len(durations) for durations in few} == {1, 2}
    assert all(len(durations) == 1 or durations.max() >= 3 * durations.min() for durations in few)

def test_toy_splits_and_seeds_share_no_utterance():  # C17
    options = data_options()
    texts = [[u.feats.sum().item() for u in data.open_dataset(options, split, letters, seed)]
             for seed in (0, 1) for split in ("train", "dev", "test")]
    assert [len(t) for t in texts] == [20, 10, 10] * 2 and len(set(sum(texts, []))) == 80
    assert list(data.training_texts(options)) == list("abcdefghijklmnopqrstuvwxyz")

def test_open_dataset_reads_the_manifest_of_its_split(tmp_path):
    paths = {split: str(write_manifest(tmp_path / f"{split}.jsonl", [{"audio": f"{split}.wav", "text": split}]))
             for split in ("train", "dev", "test")}
    options = data_options(kind="manifest", **paths)
    for split in paths:
        assert data.open_dataset(options, split, letters)[0] == data.Skip(split, f"missing: {tmp_path}/{split}.wav")
    assert list(data.training_texts(options)) == ["train"]

def test_toy_needs_order_not_frames():
    """Single frames with true boundaries stop near 1/2 (they cannot tell a pair apart); matching the order does not."""
    options = data_options(num_mels=80)
    dataset = data.ToySeq2SeqDataset(150, options, letters)
    items, table = [dataset[i] for i in range(150)], data.toy_inventory(26, 80)
    frames = torch.cat([u.feats for u in items[:100]])
    said = torch.cat([u.tokens.repeat_interleave(u.boundaries.diff().long()) for u in items[:100]])
    bias = frames.new_ones(len(frames), 1)
    weights = torch.linalg.lstsq(torch.cat([frames, bias], 1), torch.nn.functional.one_hot(said).float()).solution
    right = count = linear = 0
    for u in items[100:]:
        edges = u.boundaries.long().tolist()
        for symbol, start, end in zip(u.tokens.tolist(), edges, edges[1:]):
            steps = np.rint((np.arange(end - start) + 0.5) / (end - start) * 63).astype(int)
            rest = u.feats[start:end].numpy() - table[:, steps]
            rest -= rest.mean((1, 2), keepdims=True)                # loudness
            right, count = right + (np.square(rest).sum((1, 2)).argmin() == symbol), count + 1
            linear += (u.feats[start:end] @ weights[:-1] + weights[-1]).sum(0).argmax() == symbol
    assert right / count > 0.99 and 0.35 < linear / count < 0.6

# ---- data: manifests ----

def test_manifests_of_every_dialect_name_the_same_recordings(tmp_path):  # C18
    (tmp_path / "kaldi").mkdir()
    (tmp_path / "kaldi/wav.scp").write_text("u1 ../a.wav\nu2\t/abs/b.wav\n")
    (tmp_path / "kaldi/text").write_text("u2 zwei  drei\n\nu1 eins\nu3 vier\n")
    mine = write_manifest(tmp_path / "a.jsonl", [
        "\ufeff" + json.dumps({"audio": "a.wav", "text": "eins", "key": "u1", "duration": 1, "speaker": "s"}), "",
        {"audio_filepath": "/abs/b.wav", "text": "zwei  drei", "duration": 999_999_999},
        {"key": "u3", "source": "sub/c.wav", "target": "vier", "source_len": 9}])
    assert list(manifests.Manifest(mine)) == [
        manifests.Row("u1", str(tmp_path / "a.wav"), "eins", 1),
        manifests.Row("b", "/abs/b.wav", "zwei  drei", 999_999_999),
        manifests.Row("u3", str(tmp_path / "sub/c.wav"), "vier", None)]
    assert list(manifests.Manifest(tmp_path / "kaldi")) == [
        manifests.Row("u1", str(tmp_path / "kaldi/../a.wav"), "eins", None),
        manifests.Row("u2", "/abs/b.wav", "zwei  drei", None), manifests.Row("u3", "", "vier", None)]

@pytest.mark.parametrize("line,words", [
    ('{"audio": "a.wav"', "wanted a JSON object"), ("[1]", "wanted a JSON object"), ("[" * 9999, "a JSON object"),
    ('{"text": "a"}', "wanted a path under audio"), ('{"audio": 3, "text": "a"}', "wanted a path .* got 3"),
    ('{"audio": "a.wav", "text": ["a"]}', "wanted a string under text"),
    ('{"audio": "a.wav", "duration": "1"}', "wanted seconds as duration, .* got '1'"),
    ('{"audio": "a.wav", "duration": NaN}', "wanted seconds as duration, from 0 to below 1e9, got nan"),
    ('{"audio": "a.wav", "duration": %s}' % ("9" * 400), "wanted seconds as duration, .* got 9{60}$"),
    ('{"audio": "a.wav", "duration": 1e9}', "wanted seconds as duration, .* got 1000000000.0"),
    ('{"audio": "a.wav", "duration": 1, "offset": -1}', "wanted seconds as offset, .* got -1")])
def test_a_bad_manifest_line_names_file_and_line(tmp_path, line, words):  # C18
    path = write_manifest(tmp_path / "m.jsonl", [{"audio": "a.wav", "text": "a"}, "", line])
    with pytest.raises(ValueError, match=words) as error:
        manifests.Manifest(path)
    assert str(error.value).startswith(f"{path}:3: ")

@pytest.mark.parametrize("file, line, words", [
    ("wav.scp", "r2 sox a.wav |", r"wanted a path, got the pipe 'sox a.wav \|'; with --allow-"),
    ("wav.scp", "r2 |", r"wanted a path, got '\|'"), ("wav.scp", "r2", "wanted a path, got 'nothing'"),
    ("wav.scp", "r1 b.wav", "wanted every key once, got 'r1'"),
    ("segments", "p1 r1 0", "wanted KEY RECORDING START END"), ("segments", "p1 r1 0 1 2", "wanted KEY"),
    ("segments", "p1", "wanted KEY"), ("segments", "p1 r1 a 1", "wanted KEY"),
    *(("segments", f"p1 r1 {times}", "wanted 0 <= START < END")
      for times in ("-1 1", "1 1", "0 nan", "0 -2", "0 1e9", "1e9 -1"))])
def test_a_bad_line_of_a_kaldi_folder_is_named(tmp_path, file, line, words):
    for name, first in (("wav.scp", "r1 a.wav"), ("segments", "p0 r1 0 1"), ("text", "p0 a")):
        (tmp_path / name).write_text(f"{first}\n{line}\n" if name == file else f"{first}\n")
    refused(f"^{tmp_path}/{file}:2: {words}", manifests.Manifest, tmp_path)

def test_a_row_reads_exactly_its_part_of_the_recording(tmp_path):  # C18
    """Of a NeMo manifest and of Kaldi's segments: the samples, the frames that are planned, the seconds, the text."""
    whole = torch.from_numpy(tone(1.1, 8000) * np.linspace(0, 1, 8800)).float()
    audio.save_wav(tmp_path / "a.wav", whole.numpy(), 8000)
    saved = audio.load_wav(tmp_path / "a.wav")[0]
    for offset, seconds, first, last in (
            (0.0, 0.22, 0, 1760), (0.5, 0.22, 4000, 5760), (0.5, None, 4000, 8800), (None, 0.22, 0, 1760),
            (None, 1.05, 0, 8800), (None, 1.3, 0, 8800), (None, 1.6, 0, 8800), (0.0, 1.05, 0, 8400),
            (1.1, None, 8800, 8800), (1.0, 0.6, 8000, 8800), (0.0001, 0.0002, 1, 2)):
        part = audio.Part(tmp_path / "a.wav", offset, seconds)
        assert torch.equal(audio.load_wav(part)[0], saved[first:last]), part
        assert audio.audio_seconds(part) == (last - first) / 8000
        assert torch.equal(torch.cat(list(audio.stream(part, 8000)) or [saved[:0]]), saved[first:last])
    for offset, seconds in ((None, 1.61), (0.0, 1.61), (1.11, None), (1.0, 0.61)):
        with pytest.raises(ValueError, match="a.wav: wanted the part from .* got a recording of 1.100 s"):
            audio.load_wav(audio.Part(tmp_path / "a.wav", offset, seconds))
    rows = [{"audio_filepath": "a.wav", "text": "a", "offset": 0.0, "duration": 0.22},
            {"audio_filepath": "a.wav", "text": "b", "offset": 0.5, "duration": 0.3},
            {"audio_filepath": "a.wav", "text": "c", "offset": 0.6}, {"audio": "a.wav", "text": "d", "offset": 2.0}]
    (tmp_path / "wav.scp").write_text("r1 a.wav\n")
    (tmp_path / "segments").write_text("p1 r1 0 0.22\np2 r1 0.5 0.8\np3 r1 0.6 -1\np4 r1 2 3\np5 r9 0 1\n")
    (tmp_path / "text").write_text("p1 a\np2 b\np3 c\np4 d\np5 e\n")
    for source in (write_manifest(tmp_path / "m.jsonl", rows), tmp_path):
        dataset = data.ManifestDataset(source, data_options(), letters)
        for i, (text, first, last) in enumerate((("a", 0, 1760), ("b", 4000, 6400), ("c", 4800, 8800))):
            wanted = audio.frontend(saved[first:last], 8000, data_options())
            assert torch.equal(dataset[i].feats, wanted) and dataset.lengths()[i] == len(wanted)
            assert (dataset[i].text, dataset[i].seconds) == (text, (last - first) / 8000)
        assert re.match("unreadable: .*a.wav: wanted the part from 2 to", dataset[3].reason)
    assert dataset[4] == data.Skip("p5", "no audio: wav.scp has no line for it") and len(dataset) == 5

def test_decoding_a_part_gives_what_a_file_of_that_part_gives(tmp_path):  # C18
    """A short one, and one that is cut at its pauses; times begin with the part."""
    system = tiny_system()._replace(segment_sec=(0.5, 3.0))
    samples = audio.load_wav(long_wav(tmp_path / "whole.wav"))[0]
    for offset, seconds in ((1.5, 10.0), (2.0, 2.5)):
        first, last = round(8000 * offset), round(8000 * (offset + seconds))
        audio.save_wav(tmp_path / "alone.wav", samples[first:last], 8000)
        rows = [manifests.Row("u", str(tmp_path / "whole.wav"), "", seconds, offset),
                manifests.Row("u", str(tmp_path / "alone.wav"), "", None)]
        dataset = data.ManifestDataset(rows, system.config.data, system.tokenizer.encode, stats=system.stats,
                                       for_training=False, whole_sec=3.0)
        part, alone = (decode.recognise_inputs(system, dataset, [i])[0] for i in range(2))
        assert part.result == alone.result and len(part.result.tokens) > 5 and part.seconds == alone.seconds == seconds

def test_pipes_of_a_kaldi_folder_run_where_it_is_said_only(tmp_path, capsys):  # C18
    """None runs unasked; with --allow-pipes decode.py reads what they write, and corpora.py writes it for training."""
    folder = tmp_path / "dev"
    folder.mkdir()
    audio.save_wav(folder / "a b.wav", tone(0.5, 8000), 8000)
    (folder / "wav.scp").write_text("u1 cat 'a b.wav' |\nu2 touch ran; cat 'a b.wav' | cat |\nu3 sh -c 'exit 3' |\n"
                                    "u4 no-such-program x |\nu5 cat 'a b.wav |\nu6 a b.wav\nu7 echo |\n")
    system = tiny_system()
    for source in (lambda: manifests.Manifest(folder), lambda: decode.open_inputs(system, [str(folder)], tmp_path)):
        refused(r"wav.scp:1: wanted a path, got the pipe .*--allow-pipes decode.py runs", source)
    assert corpora.main(["kaldi", str(folder), str(tmp_path / "out")]) == 2
    assert decode.main(["--ckpt", saved(system, tmp_path / "x.pt"), str(folder)]) == 2 and not (folder / "ran").exists()
    dataset = decode.open_inputs(system, [str(folder)], tmp_path, allow_pipes=True)
    assert not (folder / "ran").exists() and dataset.durations.tolist() == [0.5, 0.5, 0, 0, 0, 0.5, 0]
    whole = data.ManifestDataset([manifests.Row("a", f"{folder}/a b.wav", "", None)], system.config.data, letters,
                                 stats=system.stats, for_training=False)[0]
    items = [dataset[i] for i in range(7)]
    assert all(torch.equal(items[i].feats, whole.feats) for i in (0, 1, 5)) and (folder / "ran").exists()
    for i, words in ((2, "wanted exit code 0, got 3"), (3, "No such file"), (4, "No closing quotation"), (6, "ffmpeg")):
        assert words in items[i].reason, items[i]
    (folder / "text").write_text("p1 one\np2 two\np3 three\n")
    (folder / "wav.scp").write_text("r1 cat 'a b.wav' |\nr2 a b.wav\n")
    (folder / "segments").write_text("p1 r1 0 0.2\np2 r1 0.25 -1\np3 r2 0.1 0.2\n")
    assert corpora.main(["kaldi", str(folder), str(tmp_path / "out"), "--allow-pipes"]) == 0
    dataset = data.ManifestDataset(tmp_path / "out/dev.jsonl", data_options(), lambda text: [])
    assert dataset.keys == ["p1", "p2", "p3"] and [row.text for row in dataset.rows] == ["one", "two", "three"]
    assert dataset.durations.tolist() == [0.2, 0.25, 0.1] and not any(row.folder for row in dataset.rows)
    assert [item.seconds for item in dataset] == [0.2, 0.25, 0.1]
    assert os.listdir(tmp_path / "out/wav/dev") == ["000000.wav"]

@pytest.mark.parametrize("command,words", [
    ("sox 'a b.wav' -t wav -", ["sox", "a b.wav", "-t", "wav", "-"]), ('flac -cds "x y"', ["flac", "-cds", "x y"]),
    *((command, ["sh", "-c", command]) for command in (
        "a b.wav | c", "a;b", "a > b", "a < b", "a $X", "a `b`", "a *", "a ?", "a [b]", "a {b,c}", "a ~/b", "a && b",
        "X=1 a", "a (b)", "a #b", "a \\b", "a !b"))])
def test_a_shell_reads_a_pipe_only_where_it_must(monkeypatch, command, words):
    given = []
    monkeypatch.setattr(subprocess, "run", lambda words, **how: given.append((words, how["cwd"], how["stdin"])) or
                        SimpleNamespace(returncode=0, stdout=b"x"))
    assert manifests.run_pipe(command, "folder") == b"x" and given == [(words, "folder", subprocess.DEVNULL)]

def shards(folder: Path) -> list[Path]:
    """Two shards, a Kaldi folder, and a manifest with a comma in its name: six rows, keys 0 to 5, some with seconds."""
    (folder / "kaldi").mkdir()
    (folder / "kaldi/wav.scp").write_bytes("3 gr\u00fcn.wav\n4   /b  c.wav \n".encode())
    (folder / "kaldi/text").write_bytes("5 \u4e94\n3  drei  mal\n".encode())
    row = lambda i: {"audio": f"sub/{i}.wav", "text": f"text {i} \u00e9", **({"duration": i / 4} if i % 2 else {})}
    first = ["\ufeff" + json.dumps(row(0)), "", " \r", json.dumps(row(1)) + "\r"]
    return [write_manifest(folder / "s-1.jsonl", first),
            write_manifest(folder / "s-2.jsonl", [json.dumps(row(2), ensure_ascii=False)]), folder / "kaldi",
            write_manifest(folder / "a,b.jsonl", [json.dumps({**row(5), "key": 6})])]

def test_one_source_may_be_paths_with_commas_patterns_and_kaldi_folders(tmp_path, monkeypatch):  # C95
    *_, comma = paths = shards(tmp_path)
    monkeypatch.chdir(tmp_path)
    keys = lambda source: [manifest[i].key for manifest in [manifests.Manifest(source)] for i in range(len(manifest))]
    assert keys("s-*.jsonl") == keys("s-2.jsonl , s-1.jsonl")[1:] + ["2"] == ["0", "1", "2"]
    assert keys("s-?.jsonl,kaldi") == keys(tmp_path / "s-1.jsonl") + keys(f"s-2.jsonl,{paths[2]}") == list("012345")
    assert keys(str(comma)) == keys(comma) == ["6"] == keys(f"{tmp_path}/a?b.jsonl")
    Path("list").write_bytes(Path("s-2.jsonl").read_bytes())    # of a config any name is a manifest's
    overrides = ["--data.train=s-*.jsonl", "--data.dev=s-1.jsonl,s-2.jsonl", "--data.test=kaldi,list"]
    options = rules.load(written(tmp_path, ISSUE_FILE), ["--data.kind=manifest", *overrides]).data
    for split, wanted in (("train", 3), ("dev", 3), ("test", 4)):
        assert len(data.open_dataset(options, split, letters)) == wanted
    assert list(data.training_texts(options)) == [f"text {i} \u00e9" for i in range(3)]
    for inputs, wanted in (([], ["3", "4", "5", "2"]), (["s-2.jsonl", "x,*.wav"], ["2", "x,*.wav"])):
        system = SimpleNamespace(config=SimpleNamespace(data=options), tokenizer=tokenizer.Tokenizer.build(["a"]),
                                 stats=torch.zeros(2, 80), segment_sec=(1.0, 30.0), vad=None, chunk=None)
        assert [row.key for row in decode.open_inputs(system, inputs, tmp_path).rows] == wanted
    for source, words in (("s-3*", "s-3"), ("s-1.jsonl,gone", "gone: wanted a text file"), ("s-1.jsonl,", ": wanted")):
        refused(words, manifests.Manifest, source)
    write_manifest(tmp_path / "s-[2].jsonl", [{"audio": "sub/9.wav", "text": "a"}])     # which matches s-2.jsonl
    assert keys("s-[2].jsonl") == keys("s-[2].jsonl,s-[2].jsonl")[1:] == ["9"]
    write_manifest(tmp_path / "s-2.jsonl", ["{}"])
    refused(r"\As-2.jsonl:1: wanted a path", manifests.Manifest, "s-*.jsonl")

def test_a_row_read_from_its_file_is_the_row_that_was_parsed_at_the_start(tmp_path):  # C94
    paths = shards(tmp_path)
    parsed = [row for path in paths for _, row in manifests.scan_rows(path)]
    manifest = manifests.Manifest(",".join(map(str, paths[:3])))
    again = [manifest[i] for i in random.Random(0).sample(range(6), 6)]
    assert sorted(again) == parsed[:6] and manifests.Manifest(paths[3])[0] == parsed[6]
    assert parsed[0] == manifests.Row("0", f"{tmp_path}/sub/0.wav", "text 0 \u00e9", None)
    assert parsed[3:6] == [manifests.Row("3", f"{tmp_path}/kaldi/gr\u00fcn.wav", "drei  mal", None),
                           manifests.Row("4", "/b  c.wav", "", None), manifests.Row("5", "", "\u4e94", None)]
    seconds = [row.duration for row in parsed[:6]]
    np.testing.assert_array_equal(manifest.index["seconds"], np.array(seconds, float))
    audio.save_wav(tmp_path / "kaldi/gr\u00fcn.wav", tone(0.5, 8000), 8000)        # a duration from its header
    dataset = data.ManifestDataset(",".join(map(str, paths[:3])), data_options(), letters)
    assert dataset.durations.tolist() == [0, 0.25, 0, 0.5, 0, 0]
    whole = paths[0].read_bytes()
    for changed in (b"# new\n" + whole, b""):
        paths[0].write_bytes(changed)
        with pytest.raises(ValueError, match=rf"^{paths[0]}, byte \d+ \(has the file changed\?\): wanted a JSON"):
            manifest[1]
    rewritten = whole.replace(b"text 1", b"TEXT 1")
    paths[0].write_bytes(rewritten)
    with pytest.raises(ValueError, match=rf"^{paths[0]}, byte \d+ \(has .*\): wanted the row of the start, .*TEXT 1"):
        manifest[1]
    assert manifest[0] == parsed[0]         # of which nothing has changed
    paths[1].write_bytes(paths[1].read_bytes().replace("\u00e9".encode(), b"\xff\xff"))
    with pytest.raises(ValueError, match=rf"^{paths[1]}, byte 0 \(has .*\): wanted UTF-8, got b'"):
        manifest[2]

def test_what_is_no_manifest_is_named_as_it_was_given(tmp_path, monkeypatch):
    """A name between commas that is empty, a folder, a pipe; and of lines of standard input `-`, not the copy of it."""
    monkeypatch.setenv("PATH", "")      # no ffmpeg
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "plain").mkdir()
    (tmp_path / "kaldi/text").mkdir(parents=True)
    (tmp_path / "kaldi/wav.scp").write_text("u1 a.wav\n")
    for source, words in (("", "'': wanted .* got an empty name"), ("a, ,b", "'a, ,b': wanted .* got an empty name"),
                          ("gone", "gone: wanted a text file, got none"), (tmp_path / "pipe", "pipe: .* got a pipe"),
                          (tmp_path / "plain", "plain: wanted a manifest, or a Kaldi folder with wav.scp"),
                          (tmp_path / "kaldi", "kaldi/text: wanted a text file, got a folder")):
        refused(words, manifests.Manifest, source)
    read = lambda content: list(manifests.read_stream(io.BytesIO(content), tmp_path, False, "-"))
    for content, words in ((wav(b"ab", 1, 16, 0), "wanted one channel"), (b"ID3\0 an mp3", ".* ffmpeg")):
        dataset = data.ManifestDataset(read(content), data_options(), letters, for_training=False)
        assert re.match(f"unreadable: .*: {words}", dataset[0].reason) and dataset[0].key == "stdin"
    for content, words in ((b'a.wav\n{"text": "a"}', "-:2: wanted a path"), (b"a.wav\n\xff", "-:2: wanted UTF-8")):
        refused(f"^{words}", read, content)

def odd_folder(folder: Path) -> list[Path]:
    """A folder of recordings and of everything that is none; returns the recordings, in order."""
    for name in ("far", "in/deep", "in/.git"):
        (folder / name).mkdir(parents=True)
    names = ["A.WAV", "b.Mp3", "deep/c.wav", "far/d.flac", "x.webm"]
    for name in [*names, ".hidden.wav", "._A.WAV", "._A.txt", ".git/e.wav", "notes.pdf"]:
        path = folder / ("" if name.startswith("far") else "in") / name
        audio.save_wav(path, tone(0.2, 8000), 8000)
    for name in ("A.txt", "b.TXT", "deep/c.txt", "x.txt"):
        (folder / "in" / name).write_text(f"text of {name}")
    (folder / "far/d.txt").write_bytes(b"\xff\xfet\0")        # UTF-16, as Windows' "Unicode"
    (folder / "in/far").symlink_to("../far")
    (folder / "in/deep/up").symlink_to("..")                   # a loop
    (folder / "in/gone.wav").symlink_to("nowhere")
    os.mkfifo(folder / "in/pipe.wav")
    return [folder / "in" / name for name in names]

def test_a_folder_gives_every_recording_and_names_what_it_leaves_out(tmp_path, capsys):  # C72
    """One list of suffixes for decode.py and corpora.py; links, loops of them, hidden files, pipes, bad texts."""
    wanted = odd_folder(tmp_path)
    folder = tmp_path / "in"
    found, left_out = manifests.find_recordings(folder)
    assert found == wanted
    assert {(os.path.relpath(path, folder), reason) for path, reason in left_out} == {
        (".hidden.wav", "hidden"), ("._A.WAV", "hidden"), ("._A.txt", "hidden"), (".git", "hidden"),
        ("notes.pdf", "no recording by its name"), ("pipe.wav", "a pipe or device"), ("gone.wav", "a link to nothing"),
        ("deep/up", "a link to a folder that is read already")}
    for count, more in ((3, ""), (4, " and 1 more")):
        some = [manifests.LeftOut(name, "hidden") for name in "abcd"[:count]]
        assert manifests.left_out_lines(some) == [f"left out {count}, hidden: a, b, c{more}"]
    dataset = decode.open_inputs(tiny_system(), [str(folder)], tmp_path)
    assert dataset.keys == [str(path) for path in wanted] and all(item.seconds == 0.2 for item in dataset)
    told = capsys.readouterr().err
    assert told.count("\n") == 5 and f"decode.py: left out 1, a pipe or device: {folder}/pipe.wav\n" in told
    assert re.search(rf"left out 4, hidden: {folder}/.git, {folder}/._A.WAV, {folder}/._A.txt and 1 more\n", told)
    audio.save_wav(folder / "A.mp3", tone(0.2, 8000), 8000)     # another copy of A: a split of its own would be a leak
    (folder / "b.TXT").write_text(" \n")
    (folder / "deep/e.flac").write_bytes(b"fLaC")
    for name in ("e.txt", "e.TXT"):
        (folder / "deep" / name).write_text(name)
    assert corpora.main(["folder", str(folder), str(tmp_path / "out"), "--dev-share", "0"]) == 0
    rows = rows_of(tmp_path / "out/train.jsonl")
    assert sorted((row["audio"], row["text"]) for row in rows) == [
        ("../in/A.WAV", "text of A.txt"), ("../in/deep/c.wav", "text of deep/c.txt"), ("../in/x.webm", "text of x.txt")]
    told = capsys.readouterr().out
    assert f"left out 1, not UTF-8: {folder}/far/d.txt\n" in told
    assert f"left out 1, an empty text beside it: {folder}/b.Mp3\n" in told
    assert f"left out 1, two texts beside it, .txt and .TXT: {folder}/deep/e.flac\n" in told
    assert f"left out 1, of the name of another recording: {folder}/A.mp3\n" in told and "no dev.jsonl" not in told
    (folder / "A.txt").unlink()
    assert corpora.main(["folder", str(folder), str(tmp_path / "out"), "--test-share", "0.2"]) == 0
    told = capsys.readouterr().out
    assert f"left out 1, no text beside it: {folder}/A.WAV\n" in told
    assert "no dev.jsonl: --dev-share 0.1 of 2 recordings is less than one\nno test.jsonl: --test-share 0.2 of" in told
    (tmp_path / "none").mkdir()
    (tmp_path / "none/a.txt").write_text("a")
    with pytest.raises(ValueError, match="got none; left out 1, no recording by its name: .*/none/a.txt$"):
        manifests.read_inputs([tmp_path / "none"], tmp_path)

def test_a_pipe_that_is_named_is_read_like_standard_input_and_a_device_is_refused(ckpt, tmp_path, capsys):  # C72
    """As `decode.py <(cat a.wav)` and `<(head list)` name it; and with several processes it is refused."""
    path = spoken(tmp_path / "a.wav", 0.6)
    wanted = decoded(capsys, "--ckpt", ckpt, path)[1][0][1]
    for content, key in ((Path(path).read_bytes(), None), (f"{path}\n".encode(), path)):
        reader, writer = os.pipe()
        with open(writer, "wb") as file, open(reader, "rb"), concurrent.futures.ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: file.write(content) + bool(file.close()))       # beside it: a pipe may hold less
            name = f"/dev/fd/{reader}"
            assert manifests.is_stream(name) and not manifests.is_stream(path)
            assert decoded(capsys, "--ckpt", ckpt, name)[:2] == (0, [[key or name, wanted]])
    assert "/dev/null: wanted a recording, a folder or a manifest, got a device" in refusal(capsys, "--ckpt", ckpt,
                                                                                           "/dev/null")

@pytest.mark.parametrize("count,dev,test,sizes", [
    (10, 0.1, 0.1, (8, 1, 1)), (30, 0.1, 0.2, (21, 3, 6)), (7, 0.5, 0.5, (0, 4, 3)), (10, 0, 1, (0, 0, 10)),
    (10, 1, 0, (0, 10, 0)), (3, 0.1, 0.1, (3, 0, 0)), (10, 0, 0.06, (9, 0, 1)),
    (20, None, None, (18, 2, 0))])
def test_shares_of_a_folder_are_exact(tmp_path, count, dev, test, sizes):
    """The whole number nearest to the share of what has a text, whatever else is in the folder."""
    for i in range(count + 5):
        audio.save_wav(tmp_path / f"{i}.wav", tone(0.1, 8000), 8000)
        if i < count:
            (tmp_path / f"{i}.txt").write_text(str(i))
    assert corpora.build_parser().parse_args(["fsdd", "in", "out"]).utterances == [3000, 200, 300, 300]
    given = corpora.build_parser().parse_args(["folder", "in", "out"])
    assert (given.dev_share, given.test_share, given.seed) == (0.1, 0.0, 0)
    shares = [] if dev is None else ["--dev-share", str(dev), "--test-share", str(test)]
    options = corpora.build_parser().parse_args(["folder", str(tmp_path), str(tmp_path), *shares])
    splits = [item[0] for item in corpora.prepare_folder(options) if not isinstance(item, manifests.LeftOut)]
    assert tuple(splits.count(split) for split in ("train", "dev", "test")) == sizes

def test_a_row_of_a_manifest_costs_24_bytes_and_its_text_none(tmp_path):  # C94
    rows = [{"audio": f"wav/speaker/{i}.wav", "text": f"{i} " * 50, "duration": 3.0} for i in range(4000)]
    path = write_manifest(tmp_path / "m.jsonl", rows)
    options = data_options(kind="manifest", train=str(path))
    tracemalloc.start()
    dataset = data.ManifestDataset(path, options, letters)
    batches = data.make_batches(dataset.lengths(), 16, 20000)
    next(iter(data.loader(dataset, batches)))
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    assert sum(map(len, data.training_texts(options))) == sum(len(row["text"]) for row in rows)
    texts = tracemalloc.get_traced_memory()[1] - kept
    tracemalloc.stop()
    assert kept / 4000 < 150 and peak / 4000 < 200 and texts / 4000 < 20
    assert len(pickle.dumps(dataset.rows)) < 4000 * 24 + 1000      # all that a worker process is given

def test_a_row_of_a_kaldi_folder_costs_under_200_bytes(tmp_path):  # C94
    names = [f"S0002W{i:06}" for i in range(10000)]
    (tmp_path / "wav.scp").write_text("".join(f"{name} /data/aishell/wav/{name}.wav\n" for name in names))
    (tmp_path / "text").write_text("".join(f"{name} some words that are said\n" for name in names))
    tracemalloc.start()
    rows = manifests.Manifest(tmp_path)
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept / 10000 < 200
    assert rows[7] == manifests.Row(names[7], f"/data/aishell/wav/{names[7]}.wav", "some words that are said", None)

def test_every_unusable_recording_is_skipped_with_its_reason(tmp_path):  # C19
    for name, seconds in {"good": 0.5, "short": 0.05, "long": 2.5, "empty": 0.0}.items():
        audio.save_wav(tmp_path / f"{name}.wav", tone(seconds, 8000), 8000)
    (tmp_path / "broken.wav").write_bytes(b"RIFF\0\0\0\0WAVE")
    (tmp_path / "inf.wav").write_bytes(wav(struct.pack("<f", math.inf), 3, 32, 1))
    (tmp_path / "folder.wav").mkdir()
    os.mkfifo(tmp_path / "fifo.wav")
    reasons = {"short": "too short: 0.050 s", "long": "too long: 2.500 s", "empty": "empty", "broken": "unreadable",
               "inf": "unreadable", "folder": "unreadable", "fifo": "unreadable",
               "gone": "missing", "nul\0": "unreadable"}
    rows = [{"audio": f"{name}.wav", "text": "ab"} for name in ["good", *reasons]]
    rows += [{"audio": "good.wav", "text": " ", "key": "blank"}, {"audio": "good.wav", "key": "none"},
             {"audio": "good.wav", "text": "a" * 12, "key": "12"}, {"audio": "good.wav", "text": "a" * 13, "key": "13"}]
    reasons |= {"blank": "no text", "none": "no text", "13": "text too long: 13 tokens, 24 frames hold at most 12"}
    dataset = data.ManifestDataset(write_manifest(tmp_path / "m.jsonl", rows), data_options(), letters,
                                   frames_per_token=2)
    skipped = {item.key: item.reason for item in dataset if isinstance(item, data.Skip)}
    assert skipped.keys() == reasons.keys() and all(skipped[k].startswith(reasons[k]) for k in reasons), skipped
    assert [item.key for item in dataset if isinstance(item, data.Utterance)] == ["good", "12"]
    assert dataset.lengths().tolist()[:5] == [24, 2, 124, 0, 0] and dataset[0].seconds == 0.5
    batch = data.collate([dataset[i] for i in range(len(dataset))])
    assert batch.keys == ["good", "12"] and {s.key for s in batch.skipped} == reasons.keys()
    (tmp_path / "wav.scp").write_text("u1 good.wav\n")
    (tmp_path / "text").write_text("u1 a\nu2 b\n")
    kaldi = data.ManifestDataset(tmp_path, data_options(), letters)
    assert kaldi[0].text == "a" and kaldi[1].reason.startswith("no audio")

def test_a_recording_of_exactly_the_shortest_or_longest_length_is_read(tmp_path):
    """To the sample: min_sec and max_sec of training, and whole_sec, beyond which decode.py cuts."""
    path = write_manifest(tmp_path / "m.jsonl", [{"audio": "a.wav", "text": "a"}])
    training = data.ManifestDataset(path, data_options(min_sec=0.1, max_sec=2.0), letters)
    whole = data.ManifestDataset(path, data_options(), letters, for_training=False, whole_sec=2.0)
    for n, trained, read in ((799, False, True), (800, True, True), (16000, True, True), (16001, False, False)):
        audio.save_wav(tmp_path / "a.wav", tone(n / 8000, 8000)[:n], 8000)
        assert isinstance(training[0], data.Utterance) == trained
        assert (len(whole[0].feats) > 0) == read and whole[0].seconds == n / 8000
    anything = data.ManifestDataset(path, data_options(min_sec=0.0), letters)
    for n, trained in ((199, False), (200, True)):  # a window of 25 ms
        audio.save_wav(tmp_path / "a.wav", tone(n / 8000, 8000)[:n], 8000)
        assert isinstance(anything[0], data.Utterance) == trained

def test_manifests_that_are_missing_or_name_nothing_that_can_be_used_are_told_by_field(tmp_path, capsys, ckpt):
    path = tiny_yaml(tmp_path / "tiny.yaml")
    good = write_manifest(tmp_path / "good.jsonl", [{"audio": spoken(tmp_path / "a.wav", 0.6), "text": "ab"}] * 2)
    write_manifest(tmp_path / "bad.jsonl", [{"audio": f"no/{i}.wav", "text": "ab"} for i in range(5)])
    skipped = (f"wanted recordings to use, got none: skipped 5 of 5; 0: missing: {tmp_path}/no/0.wav; 1: missing: "
               f"{tmp_path}/no/1.wav; 2: missing: {tmp_path}/no/2.wav\n")
    gone = f"{tmp_path}/gone: wanted a text file, got none of that name\n"
    empty = f"wanted utterances, got none in {write_manifest(tmp_path / 'empty.jsonl', [])}\n"
    for field, other, name, words in (("train", "dev", "gone", gone), ("dev", "train", "gone", gone),
                                      ("train", "dev", "bad.jsonl", skipped), ("dev", "train", "bad.jsonl", skipped),
                                      ("dev", "train", "empty.jsonl", empty)):
        argv = [path, "--data.kind=manifest", f"--data.{field}={tmp_path / name}", f"--data.{other}={good}",
                "--dry-run"]
        assert train.main(argv) == 2 and capsys.readouterr().err == f"train.py: data.{field}: {words}"
    system = checkpoint.load_system(ckpt, "cpu")
    options = replace(system.config.data, kind="manifest", test=f"{tmp_path}/gone")
    with pytest.raises(ValueError, match=f"^the checkpoint's data.test: {tmp_path}/gone: wanted a text file"):
        decode.open_inputs(system._replace(config=replace(system.config, data=options)), [], tmp_path)

def test_a_run_that_moved_with_its_manifests_finds_them_from_any_folder(tmp_path, monkeypatch, capsys):  # C95
    """Names are relative to the folder of runs/: resumed and decoded from a folder with manifests of its own."""
    home, other = tmp_path / "home", tmp_path / "other"
    for folder, count in ((home, 4), (other, 2)):
        (folder / "corpus").mkdir(parents=True)
        rows = [{"audio": f"{i}.wav", "text": "ab ba", "key": f"{folder.name}{i}"} for i in range(count)]
        for row in rows:
            spoken(folder / "corpus" / row["audio"], 0.7)
        for split in ("train", "dev", "test"):
            write_manifest(folder / f"corpus/{split}.jsonl", rows)
    monkeypatch.chdir(home)
    names = [f"--data.{split}=corpus/{split}.jsonl" for split in ("dev", "test")]
    assert train.main([tiny_yaml(home / "tiny.yaml"), "--data.kind=manifest", "--data.train=corpus/t*n.jsonl", *names,
                       "--training.num_epochs=1"]) == 0
    assert manifests.find_again("corpus/dev.jsonl", "runs/latest/checkpoints/best.pt") == "corpus/dev.jsonl"
    monkeypatch.chdir(other)
    for moved in (home, tmp_path / "new"):
        home.rename(moved)
        home = moved
        assert train.main(["--resume", str(moved / "runs/latest")]) == 0
        capsys.readouterr()
        best = moved / "runs/latest/checkpoints/best.pt"
        code, lines, _ = decoded(capsys, "--ckpt", best)
        assert code == 0 and [key for key, _ in lines] == ["home0", "home1", "home2", "home3"]
        assert manifests.find_again("corpus/train.jsonl,corpus/d*.jsonl", best) == (
            f"{moved}/corpus/train.jsonl,{moved}/corpus/d*.jsonl")
    for name in ("gone.jsonl", "corpus/train.jsonl,gone.jsonl", ""):    # of two names, both must be there
        assert manifests.find_again(name, best) == name
    assert manifests.find_again(f"{home}/corpus/dev.jsonl", best) == f"{home}/corpus/dev.jsonl"

def recordings(folder: Path, count: int) -> Path:
    """A manifest of `count` tones of 0.3 to 1.2 s at 8 and 16 kHz, durations in every other row."""
    rows = []
    for i in range(count):
        seconds, rate_hz = 0.3 + 0.9 * (i * 7 % count) / count, (8000, 16000)[i % 2]
        audio.save_wav(folder / f"r{i}.wav", tone(seconds, rate_hz, 300 + 40 * i), rate_hz)
        rows.append({"audio": f"r{i}.wav", "text": "abc"[: i % 3 + 1], **({"duration": seconds} if i % 3 else {})})
    return write_manifest(folder / "train.jsonl", rows)

def test_a_manifest_item_is_the_front_end_of_its_file_at_a_drawn_speed(tmp_path):
    path = recordings(tmp_path, 12)
    stats = torch.stack([torch.full((40,), 9.0), torch.full((40,), 0.5)])
    options = data_options()
    plain = data.ManifestDataset(path, options, letters, stats=stats)
    samples, rate_hz = audio.load_wav(tmp_path / "r5.wav")
    for snr_db in ((0.0, 0.0), ()):
        options.augment.snr_db = snr_db     # for training: dev data stay as they are
        assert torch.equal(plain[3, 5].feats, audio.frontend(samples, rate_hz, options, stats))
    options.augment.freq_masks = options.augment.time_masks = 0
    fast = data.ManifestDataset(path, options, letters, augment=True, stats=stats)
    ratios = np.array([[len(fast[e, i].feats) / len(plain[i].feats) for i in range(12)] for e in range(6)])
    near = np.abs(ratios[..., None] - 1 / np.array([0.9, 1.0, 1.1]))
    assert near.min(-1).max() < 0.06 and set(near.argmin(-1).ravel()) == {0, 1, 2}
    assert np.abs(fast.lengths(4) - [len(fast[4, i].feats) for i in range(12)]).max() <= 1
    assert fast.lengths().tolist() == fast.lengths(0).tolist() != fast.lengths(1).tolist()
    assert all(torch.equal(fast[i].feats, fast[0, i].feats) for i in range(12))     # an index alone is of epoch 0
    played = audio.load_wav(tmp_path / "r5.wav")[0]                  # 500 Hz at 1.1 is 550 Hz
    for speed in (0.9, 1.1):
        y = audio.resample(played, round(rate_hz * speed), 8000)
        peak = torch.fft.rfft(y * torch.hann_window(len(y))).abs().argmax() * 8000 / len(y)
        assert abs(peak - 500 * speed) < 8000 / len(y)

def test_augmented_batches_are_equal_for_every_worker_count_and_resume(tmp_path):  # C16
    path = recordings(tmp_path, 12)
    options = data_options()
    options.augment.snr_db = 5.0, 30.0
    make = lambda seed: data.ManifestDataset(path, options, letters, seed=seed, augment=True)
    batches = data.make_batches(make(0).lengths(2), 4, 10**6, seed=0, epoch=2)
    random_state = torch.get_rng_state()
    runs = [list(data.loader(make(0), batches, 2, num_workers=n)) for n in (0, 2)]
    runs.append(list(data.loader(make(0), batches, 2))[:1] + list(data.loader(make(0), batches, 2, start=1)))
    assert torch.equal(torch.get_rng_state(), random_state)
    for row, index in enumerate(batches[1]):
        feats = make(0)[2, index].feats
        assert torch.equal(runs[0][1].feats[row, :len(feats)], feats)
    for batch, *others in zip(*runs, strict=True):
        for other in others:
            assert other.keys == batch.keys and torch.equal(other.feats, batch.feats)
            assert torch.equal(other.tokens, batch.tokens) and torch.equal(other.feat_lens, batch.feat_lens)
    sums = {name: [make(seed)[epoch, i].feats.sum().item() for i in range(12)]
            for name, seed, epoch in [("a", 0, 2), ("epoch", 0, 3), ("seed", 1, 2)]}
    for other in ("epoch", "seed"):
        assert sum(a != b for a, b in zip(sums["a"], sums[other])) > 9
    assert list(data.loader(make(0), batches, 2, start=len(batches))) == []

# ---- data: batches ----

@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_hold_every_index_once_within_both_bounds(shuffle):  # C20
    rng = np.random.default_rng(0)
    for count, size, frames in [(0, 4, 100), (1, 4, 100), (500, 16, 2000), (500, 7, 10**9), (300, 10**9, 500)]:
        lengths = rng.integers(0, 900, count)
        batches = data.make_batches(lengths, size, frames, 3, 1, shuffle)
        assert sorted(sum(batches, [])) == list(range(count)) and all(batches)
        for batch in batches:
            assert len(batch) <= size and (len(batch) * lengths[batch].max() <= frames or len(batch) == 1)
            assert shuffle or lengths[batch].sum() >= 0.9 * len(batch) * lengths[batch].max()
        assert batches == data.make_batches(lengths, size, frames, 3, 1, shuffle)
    assert len(data.make_batches(np.array([10, 10]), 2, 20, 3, 1, shuffle)) == 1  # both bounds to the last frame
    assert data.make_batches(np.array([1]), 1, 1, 3, 1, shuffle) == [[0]]
    for lengths, count in (([8, 10], 1), ([7, 9], 2), ([1, 7, 9], 3)):            # a tenth of it is padding, or more
        assert len(data.make_batches(np.array(lengths), 2, 99, shuffle=False)) == count
    lengths = np.arange(100, 600)
    assert data.make_batches(lengths, 8, 10**9) == data.make_batches(lengths, 8, 10**9, 0, 0, True)
    mates = [{frozenset(batch) for batch in data.make_batches(np.arange(100, 600), 8, 10**9, 3, epoch, shuffle)}
             for epoch in (1, 2)]
    assert len(mates[0] & mates[1]) < 6 if shuffle else mates[0] == mates[1]
    order = [batch[0] for batch in data.make_batches(np.arange(100, 600), 8, 10**9, 3, 1, shuffle)]
    assert (np.corrcoef(order, np.arange(len(order)))[0, 1] < 0.7) == shuffle     # short and long ones in turn

@needs_digits
@pytest.mark.parametrize("split", ["train", "dev", "test", "unseen_speaker"])
def test_padding_stays_under_a_tenth_on_the_digits_corpus(split):  # C20
    options = data_options(lfr_m=4, lfr_n=4)
    for augment, epoch in ((True, 0), (True, 1), (False, 0)):
        source = SHARED / f"speech/digits/{split}.jsonl"
        lengths = data.ManifestDataset(source, options, letters, augment=augment).lengths(epoch)
        batches = data.make_batches(lengths, 16, 20000, epoch=epoch)
        padded = sum(len(batch) * lengths[batch].max() for batch in batches)
        assert 1 - lengths.sum() / padded < 0.10

def test_collate_pads_with_zeros_and_keeps_skips_apart():  # C20
    make = lambda key, T, U: data.Utterance(key, torch.full((T, 3), float(T)), torch.arange(1, U + 1), key * U, None,
                                            T / 100)
    batch = data.collate([make("a", 2, 3), data.Skip("b", "missing"), make("c", 4, 1)])
    assert batch.feats[:, :, 0].tolist() == [[2, 2, 0, 0], [4, 4, 4, 4]] and batch.feat_lens.tolist() == [2, 4]
    assert batch.tokens.tolist() == [[1, 2, 3], [1, 0, 0]] and batch.token_lens.tolist() == [3, 1]
    assert {t.dtype for t in (batch.feat_lens, batch.tokens, batch.token_lens)} == {torch.int64}
    assert batch[:1] + batch[5:] == (["a", "c"], ["aaa", "c"], [data.Skip("b", "missing")])
    alone = data.collate([data.Skip("b", "missing")])
    assert len(alone.feats) == len(alone.feat_lens) == len(alone.tokens) == 0 and len(alone.skipped) == 1
    with pytest.raises(ValueError, match=r"one width .* got \[\(\(2, 3\), \(3,\)\), \(\(2, 4\), \(1,\)\)\]"):
        data.collate([make("a", 2, 3), make("c", 4, 1)._replace(feats=torch.zeros(2, 4))])
    with pytest.raises(ValueError, match=r"tokens \(U,\), got \[\(\(2, 3\), \(1, 3\)\)\]"):
        data.collate([make("a", 2, 3)._replace(tokens=torch.ones(1, 3))])

# ---- live: pipes, resampling and features of what is still being made ----

class Trickle(io.RawIOBase):
    """A pipe that gives a random number of bytes at a time."""

    def __init__(self, content: bytes, seed: int):
        self.rest = content
        self.rng = random.Random(seed)

    def readable(self):
        return True

    def readinto(self, buffer):
        n = min(len(buffer), self.rng.randint(1, 5000))
        got, self.rest = self.rest[:n], self.rest[n:]
        buffer[:len(got)] = got
        return len(got)

def wav_bytes(samples, rate_hz, size=None, extra=b""):
    """A 16-bit WAV, with another data size if given, and a chunk before the samples"""
    return wav(pcm_of(samples), rate_hz=rate_hz, size=size, before=extra)

@pytest.mark.parametrize("size, extra", [(None, b""), (0, b""), (2**32 - 1, b"LIST" + struct.pack("<I", 3) + b"abc\0")])
def test_a_pipe_gives_what_the_file_holds(size, extra):  # C161
    samples = torch.rand(5000) - 0.5
    content = wav_bytes(samples, 8000, size, extra)
    pipe = io.BufferedReader(Trickle(content, 0))
    header = live.pipe_header(pipe)
    pieces = list(live.pipe_samples(pipe, header))
    heard = torch.cat(pieces)
    assert header.rate_hz == 8000 and torch.equal(heard, audio.load_wav(content)[0])
    assert max(map(len, pieces)) == 1600        # 0.1 s at 16 kHz
    bare = io.BufferedReader(Trickle(content[-10000:] + b"x", 1))  # an odd byte at the end
    assert torch.equal(torch.cat(list(live.pipe_samples(bare, live.pipe_header(bare, 8000)))), heard)
    more = io.BufferedReader(Trickle(wav_bytes(samples, 8000) + b"LIST" + bytes(500), 0))      # ends with its data
    odd = SimpleNamespace(read1=lambda count: more.read(min(count, 1111)))      # 9 times leave half a sample
    assert torch.equal(torch.cat(list(live.pipe_samples(odd, live.pipe_header(more)))), heard)
    assert live.pipe_header(io.BytesIO(wav(pcm_of(samples), channels=2))).num_samples == 2500

def test_a_pipe_that_is_no_wav_is_one_error():
    for content in (b"", b"RIFF", b"hello, world, this is no WAV", wav_bytes(torch.zeros(9), 8000)[:30]):
        with pytest.raises(ValueError, match="standard input: wanted a WAV .* or, with --pcm RATE"):
            live.pipe_header(io.BufferedReader(Trickle(content, 0)))
    long, too_long = (b"LIST" + struct.pack("<I", size) + bytes(size) for size in (2**20 - 100, 2**20))
    assert live.pipe_header(io.BytesIO(wav_bytes(torch.zeros(9), 8000, extra=long))).num_samples == 9
    with pytest.raises(ValueError, match="standard input: wanted a WAV "):      # a MiB before the samples is the most
        live.pipe_header(io.BytesIO(wav_bytes(torch.zeros(9), 8000, extra=too_long)))

@pytest.mark.parametrize("rate_in, rate_out", [
    (8000, 16000), (44100, 16000), (16000, 8000), (16000, 16000), (11025, 16000)])
def test_pieces_are_resampled_to_what_the_whole_gives(rate_in, rate_out):  # C161
    rng = random.Random(rate_in)
    samples = normal(rate_in, 3 * rate_in // 2)
    whole = audio.resample(samples, rate_in, rate_out)
    state = live.Resampling(rate_in, rate_out, torch.zeros(0))
    for count in (1, 999, 160):     # outputs, which come with the input that is said and not before
        needed = state.inputs_for(count)
        assert len(live.resample_more(state, samples[:needed])[1]) >= count
        assert len(live.resample_more(state, samples[:needed - 1])[1]) < count
        state, _ = live.resample_more(state, samples[:777])
    up, down = rate_out // math.gcd(rate_in, rate_out), rate_in // math.gcd(rate_in, rate_out)
    assert len(state.held) <= 2 * live.reach(up, down) + down       # of fixed size
    for longest in (300, 40000):
        sizes = [rng.randint(0, longest) for _ in range(2 * len(samples) // longest + 1)]
        pieces = list(samples.split([*sizes, len(samples) - sum(sizes)])) if sum(sizes) < len(samples) else [samples]
        close(torch.cat(list(live.resample_pieces(pieces, rate_in, rate_out))), whole, 1e-6)

@pytest.mark.parametrize("rate_hz, mels, m, n", [
    (16000, 80, 7, 6), (8000, 40, 1, 1), (8000, 20, 4, 3), (16000, 20, 5, 2)])
def test_features_of_parts_are_rows_of_the_whole(rate_hz, mels, m, n):  # C15
    options = SimpleNamespace(sample_rate=rate_hz, num_mels=mels, lfr_m=m, lfr_n=n)
    stats = normal(1, 2, m * mels)
    samples = normal(0, rate_hz // 2 + 123) / 10
    whole = audio.frontend(samples, rate_hz, options, stats)
    first = 0
    for stop in (1, 2, 5, 8):  # frames that are certain as soon as their samples are there
        needed = live.samples_until(stop, options)
        assert needed == max(stop * n * rate_hz // 100, ((stop - 1) * n + m // 2) * rate_hz // 100 + rate_hz // 40)
        part = live.frontend_part(samples[live.first_sample(first, options):needed], first, stop, options, stats)
        close(part, whole[first:stop], 1e-4)
        first = stop
    rest = live.frontend_part(samples[live.first_sample(first, options):], first, None, options, stats)
    close(rest, whole[first:], 1e-4)
    window = samples[:rate_hz // 40]
    close(live.frontend_part(window, 0, None, options, stats), audio.frontend(window, rate_hz, options, stats), 1e-4)

# ---- funasr_layers: FSMN, relative positions ----

VARIANTS = ("sanm", "sanm_alt", "bicif", "conformer")
WAVS = ("fsdd_dev_a", "fsdd_dev_b", "aishell_dev", "libri_dev")  # in the order of batch.npz and train.npz

@pytest.mark.parametrize("kernel_size, shift", [(11, 0), (7, 2), (9, 4)])
def test_an_fsmn_equals_a_loop_and_never_sees_padding(kernel_size, shift):
    half = kernel_size // 2
    for most in (half, -half):
        funasr_layers.Fsmn(3, kernel_size, most)
    for outside in (half + 1, -half - 1):
        refused(f"within half of kernel_size {kernel_size}, got {outside}", funasr_layers.Fsmn, 3, kernel_size, outside)
    assert funasr_layers.Fsmn(3, kernel_size).reach == (half, half)
    fsmn, x = funasr_layers.Fsmn(3, kernel_size, shift), torch.randn(1, 6, 3)
    left = (kernel_size - 1) // 2 + shift
    taps = [(t, k, t + k - left) for t in range(6) for k in range(kernel_size) if 0 <= t + k - left < 6]
    expected = x[0].clone()
    for t, k, s in taps:
        expected[t] += fsmn.weight[:, 0, k] * x[0, s]
    torch.testing.assert_close(fsmn(x, torch.ones(1, 1, 6, dtype=torch.bool))[0], expected)
    padded = torch.cat([x, torch.full((1, 2, 3), 1e3)], 1)
    seen = fsmn(padded, attention.padding_mask(torch.tensor([6]), 8)[:, None])
    torch.testing.assert_close(seen[0, :6], expected)
    assert not seen[0, 6:].any()

def test_positions_of_sanm_equal_funasr():
    expected = np.load(kit("units/units.npz"))["pe_560"]
    np.testing.assert_allclose(funasr_layers.halved_sinusoids(len(expected), 560).numpy(), expected, atol=2e-6)
    assert funasr_layers.halved_sinusoids(2, 4).shape == (2, 4)
    for dim in (2, 5):
        refused(f"even and 4 or more, got {dim}", funasr_layers.halved_sinusoids, 2, dim)

def test_relative_codes_count_down_from_5000_or_the_length():
    codes = funasr_layers.relative_codes(torch.tensor([3, 5002]), 5002, 8)
    table = attention.sinusoids(torch.arange(5002), 8)
    torch.testing.assert_close(codes[0, :3], table[[4999, 4998, 4997]], atol=1e-3, rtol=0)
    torch.testing.assert_close(codes[1], table.flip(0), atol=1e-3, rtol=0)

def test_relative_shift_is_the_zero_column_trick_over_each_utterances_own_length():
    scores, lens = torch.randn(3, 2, 7, 7), torch.tensor([7, 4, 1])
    moved = funasr_layers.relative_shift(scores, lens)
    for b, L in enumerate(lens.tolist()):
        own = scores[b, :, :L, :L]
        trick = torch.nn.functional.pad(own, (1, 0)).reshape(2, L + 1, L)[:, 1:]
        torch.testing.assert_close(moved[b, :, :L, :L], trick, atol=0, rtol=0)

@pytest.mark.parametrize("width, frames, length",
                         [(7, 0, 0), (8, 1, 0), (9, 6, 0), (10, 7, 1), (11, 10, 1), (12, 11, 2)])
def test_two_windows_of_an_image_see_seven_frames_and_bins(width, frames, length):
    x, lens = funasr_layers.ImageSubsampling(width, 4)(torch.zeros(2, 11, width), ints(11, frames))
    assert x.shape == (2, 2, 4) and lens.tolist() == [2, length]

def test_batch_norm_learns_from_real_steps_only():
    """Mean and variance by hand, of what each utterance without padding gives it in evaluation; it takes a tenth."""
    module, x, lens = funasr_layers.BatchNormConvolution(4, 3).double(), torch.randn(2, 6, 4).double(), ints(6, 3)
    steps = []  # (n,4) of each
    hook = module.norm.register_forward_pre_hook(lambda _, given: steps.append(given[0][0].T))
    for n, row in zip(lens.tolist(), x):
        module.eval()(row[None, :n], None)
    hook.remove()
    mask = attention.padding_mask(lens, 6)[:, None]
    module.train()(torch.where(mask.transpose(1, 2), x, 1e3), mask)
    real = torch.cat(steps)
    mean = sum(real) / 9
    torch.testing.assert_close(module.norm.running_mean, 0.1 * mean)
    torch.testing.assert_close(module.norm.running_var, 0.9 + 0.1 * sum((real - mean) ** 2) / 8)

@pytest.mark.parametrize("lens", [[1], [1, 0]])
def test_batch_norm_of_a_single_real_step_is_that_of_evaluation_and_learns_nothing(lens):  # C25
    module, x = funasr_layers.BatchNormConvolution(4, 3), torch.randn(len(lens), 1, 4)
    module(torch.randn(2, 6, 4), None)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    mask = attention.key_mask(torch.tensor(lens), 1)
    found = module(x, mask)
    torch.testing.assert_close(module.eval()(x, mask)[0], found[0])
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())

# ---- batcher: the rule, with a clock of our own ----

def test_choose_batch_is_the_largest_set_of_like_lengths_around_the_oldest():  # C55
    """Oracle: every subset, tried."""
    rng = np.random.default_rng(5)
    for _ in range(60):
        lengths = rng.integers(1, 40, rng.integers(1, 9)).tolist()
        chosen = batcher.choose_batch(lengths, 4, 90)

        def allowed(group) -> bool:
            sizes = [lengths[i] for i in group]
            return (0 in group and len(group) <= 4 and max(sizes) <= 1.5 * min(sizes)
                    and (len(group) == 1 or max(sizes) * len(group) <= 90))

        groups = (group for n in range(1, 5) for group in itertools.combinations(range(len(lengths)), n))
        best = max(len(group) for group in groups if allowed(group))
        assert allowed(chosen) and len(chosen) == best == len(set(chosen))
    assert [len(batcher.choose_batch([45, 45], 4, most)) for most in (90, 89)] == [2, 1]
    assert batcher.choose_batch([100, 70, 140], 4, 1000) == [1, 0]      # of two that are as large, the shorter one
    assert batcher.seconds_left(0.0) == 0.0

def test_nobody_of_sixteen_clients_waits_longer_than_three_full_batches():  # C131
    """A fake clock: each client asks anew when answered; a batch costs 6 ms, and 0.017 ms for each padded frame."""
    rng, cost = np.random.default_rng(6), lambda lengths: 6.0 + 0.017 * max(lengths) * len(lengths)
    waiting, now, waits = [(0.0, int(n)) for n in rng.integers(10, 261, 16)], 0.0, []
    while len(waits) < 3000:
        chosen = batcher.choose_batch([n for _, n in waiting], 16, 20000)
        now += cost([waiting[i][1] for i in chosen])
        waits += [now - waiting[i][0] for i in chosen]
        waiting = [one for i, one in enumerate(waiting) if i not in chosen]
        waiting += [(now, int(n)) for n in rng.integers(10, 261, len(chosen))]
    assert max(waits) < 3 * cost([260] * 16) and 3000 / now > 1.3 / cost([135])

def job(frames: int, now: float, deadline: float = 1e9, has_left=lambda: False) -> batcher.Job:
    return batcher.Job(torch.zeros(frames, 40), bodies.Upload([], 0.0), now, deadline, has_left)

def batcher_without_model(**options) -> Batcher:
    return Batcher(lambda feats: [None] * len(feats), serve_options(**options), Metrics())

def test_batch_waits_for_as_many_as_were_just_answered_and_not_for_one_who_is_alone():  # C55
    batcher = batcher_without_model(max_wait_ms=50.0)
    batcher.run_batch([job(10, 0.0), job(10, 0.0)])
    end = batcher.last_answer
    batcher.submit([job(10, end - 0.1)])                    # who waited meanwhile does not go before one is back
    assert batcher.poll(end + 0.01) == ([], pytest.approx(0.04))
    batcher.submit([job(10, end + 0.02)])
    assert len(batcher.poll(end + 0.02)[0]) == 2            # both are back, and nobody arrives
    batcher.run_batch([job(10, 0.0)])
    batcher.submit([job(10, batcher.last_answer)])
    assert len(batcher.poll(batcher.last_answer)[0]) == 1      # one client, again and again
    batcher.run_batch([job(10, 0.0), job(10, 0.0)])
    batcher.submit([job(10, batcher.last_answer)])
    assert batcher.poll(batcher.last_answer + 0.0499)[0] == []             # the other one may be back
    assert len(batcher.poll(batcher.last_answer + 0.0501)[0]) == 1         # it has left
    batcher.run_batch([job(10, 0.0), job(10, 0.0)])
    batcher.submit([job(10, batcher.last_answer + 0.05)])
    assert len(batcher.poll(batcher.last_answer + 0.05)[0]) == 1           # too late to belong to them
    batcher.submit([job(10, 0.0) for _ in range(2)] + [job(100, 0.0)])      # one request of two batches
    batcher.run_batch(batcher.poll(0.0)[0])
    assert len(batcher.poll(0.0)[0]) == 1                   # is not waited for by its own rest

def test_a_recording_whose_pieces_fill_a_batch_wakes_the_inference_thread_and_waits_for_nobody():  # C55
    batcher = batcher_without_model(max_wait_ms=9000.0)
    threading.Thread(target=batcher.run, daemon=True).start()
    with batcher.preparing():       # somebody else arrives all the while
        batcher.submit([job(10, time.monotonic())])
        time.sleep(0.1)
        pieces = [job(10, time.monotonic()) for _ in range(20)]
        for piece in pieces:
            piece.utterance = pieces[0].utterance
        batcher.submit(pieces)
        assert pieces[0].outcome.result(PATIENCE) is None
    assert pieces[-1].outcome.result(PATIENCE) is None

def test_batch_waits_only_while_somebody_arrives_and_not_past_its_patience():  # C55
    batcher = batcher_without_model(max_wait_ms=5.0, max_batch_size=2)
    assert batcher.poll(0.0) == ([], None)
    first, second = job(10, 0.0), job(10, 0.001)
    batcher.submit([first])
    with batcher.preparing():
        assert batcher.poll(0.002) == ([], pytest.approx(0.003))
        assert batcher.poll(0.005)[0] == [first]        # patience is over
        batcher.submit([first, second])
        assert batcher.poll(0.002)[0] == [first, second]        # full
        batcher.submit([first, job(100, 0.0)])
        assert batcher.poll(0.002)[0] == [first]        # as many wait as it could hold
        batcher.waiting.clear()
        batcher.options.max_batch_size = 3
        batcher.submit([first, second])
        assert batcher.poll(0.0055) == ([], pytest.approx(0.0005))      # counted from the last who came
        batcher.waiting[1] = job(10, 0.039)
        assert batcher.poll(0.0395) == ([], pytest.approx(0.0005))      # but the first waits 8 times 5 ms at most
        batcher.waiting.clear()
        batcher.submit([first])
    assert batcher.poll(0.002)[0] == [first]            # nobody arrives
    batcher.submit([first, job(100, 0.0)])
    assert batcher.poll(0.0)[0] == [first] and len(batcher.waiting) == 1

def test_the_inference_thread_is_woken_by_the_first_job_a_full_batch_and_the_last_who_arrives():
    batcher, woken = batcher_without_model(max_batch_size=3), []
    batcher.changed.notify = lambda: woken.append((len(batcher.waiting), batcher.arriving))
    with batcher.preparing(), batcher.preparing():
        for _ in range(3):
            batcher.submit([job(10, 0.0)])
    assert woken == [(1, 2), (3, 2), (3, 0)]

def test_whatever_goes_wrong_around_a_batch_the_inference_thread_lives():
    batcher = batcher_without_model()
    threading.Thread(target=batcher.run, daemon=True).start()
    broken, sound = job(10, 0.0, has_left=lambda: 1 / 0), job(10, 0.0)
    for one in (broken, sound):
        batcher.submit([one])
        concurrent.futures.wait([one.outcome], PATIENCE)
    assert isinstance(broken.outcome.exception(0), ZeroDivisionError)
    assert sound.outcome.result(0) is None and sound.batch_size == 1

def test_batch_drops_the_late_and_the_gone_and_a_poisoned_item_fails_alone(monkeypatch):  # C56
    seen = []
    now = 100.0
    monkeypatch.setattr(batcher, "time", SimpleNamespace(monotonic=lambda: now))

    def infer(jobs):
        seen.append([len(job.feats) for job in jobs])
        if 13 in seen[-1]:
            raise RuntimeError("poison")
        return [transcribe.Recognition(report.Result(str(n), 1.0, [], []), []) for n in seen[-1]]

    queue = Batcher(infer, serve_options(), Metrics())
    jobs = [job(10, now), job(11, now, deadline=now), job(12, now, has_left=lambda: True), job(13, now), job(14, now)]
    queue.run_batch(jobs)
    assert seen == [[10, 13, 14], [10], [13], [14]]
    outcomes = [j.outcome.exception(0) or j.outcome.result(0) for j in jobs]
    outcomes = [getattr(outcome, "status", None) or type(outcome).__name__ for outcome in outcomes]
    assert outcomes == ["Recognition", 504, "ClientLeft", "RuntimeError", "Recognition"]
    assert jobs[4].outcome.result().result.text == "14"

def test_queue_takes_all_of_a_request_or_none():  # C56
    batcher = batcher_without_model(max_queue=3)
    batcher.submit([job(1, 0.0), job(1, 0.0)])
    with pytest.raises(web.Refusal) as refused:
        batcher.submit([job(1, 0.0), job(1, 0.0)])
    assert (refused.value.status, refused.value.headers, len(batcher.waiting)) == (429, (("Retry-After", "1"),), 2)
    batcher.submit([job(1, 0.0)])
    assert len(batcher.waiting) == 3

def test_the_queues_depth_counts_utterances_and_not_the_pieces_of_long_ones():  # C60
    server = serve.Server(serve_options(), print)     # nobody takes from its queue
    server.open(settings.Models(None, serving_system()))
    pieces = [job(10, 0.0) for _ in range(6)]
    for piece in pieces:
        piece.utterance = pieces[0].utterance
    server.batcher.submit(pieces + [job(10, 0.0)])
    server.server_close()
    server.batcher.measure([job(10, 0.0), job(30, 0.0), job(20, 0.0)], 1.0, 0.25)
    assert server.batcher.last_answer == 1.25
    text = serve.metrics_text(server)
    assert "\nasr_queue_depth 2\n" in text and text.count("\nasr_batch_padding_ratio 0.333333") == 1
    assert "\nasr_batch_size_sum 3\nasr_batch_size_count 1\n" in text       # what goes through the model at once

def test_a_bucket_counts_what_is_at_most_its_bound_and_a_refusal_has_its_reason():  # C60
    metrics = Metrics()
    for value in (0.001, 0.0025, 0.0026, 30, 31):
        metrics.observe("asr_queue_seconds", value)
    metrics.observe("asr_batch_size", 1)
    metrics.observe("asr_step_size", 1)
    text = metrics.text({"asr_queue_depth": 2})
    found = {name: re.findall(rf'{name}_bucket{{le="(.*)"}} (.*)', text)
             for name in ("asr_queue_seconds", "asr_batch_size", "asr_step_size")}
    bounds = "0.001 0.0025 0.005 0.01 0.025 0.05 0.1 0.25 0.5 1 2.5 5 10 30 +Inf".split()
    assert found["asr_queue_seconds"] == list(zip(bounds, "1 2 3 3 3 3 3 3 3 3 3 3 3 4 5".split(), strict=True))
    assert [bound for bound, _ in found["asr_batch_size"]] == "1 2 4 8 12 16 24 32 64 +Inf".split()
    assert [bound for bound, _ in found["asr_step_size"]] == "1 2 4 8 12 16 24 32 64 128 +Inf".split()
    assert "asr_queue_seconds_sum 61.0061\n" in text and "# TYPE asr_queue_depth gauge\nasr_queue_depth 2\n" in text
    for status, code in ((429, "queue_full"), (504, "deadline_exceeded"), (408, "request_timeout"),
                         (413, "body_too_large"), (503, "draining"), (503, "loading"), (200, ""), (404, "not_found")):
        for route in ("/transcribe", "/health", "/ready"):
            metrics.count_request(route, status, code, 0.0)
    reasons = re.findall(r'asr_rejected_total{reason="(.*)"} (.*)', metrics.text({}))
    wanted = "queue_full deadline_exceeded request_timeout too_large draining loading".split()
    assert reasons == [(name, "1") for name in wanted]

def test_steps_of_streams_go_together_and_take_turns_with_batches_of_utterances():  # C205
    """A step waits for one batch of utterances at most, and these for one batch of steps; without a model."""
    seen = []
    options = serve_options(max_batch_size=2, max_queue=2)
    batcher = Batcher(lambda jobs: seen.append(len(jobs)) or jobs, options, Metrics(),
                      lambda steps: seen.append(-len(steps)) or steps)

    def step() -> Step:
        return Step(torch.zeros(9), None, 0.0, math.inf, lambda: False)

    batcher.submit([job(10, 0.0)])
    batcher.submit([job(10, 0.0) for _ in range(4)], bounded=False)         # a stream's segments find room
    for _ in range(3):
        batcher.submit_step(step())
    for _ in range(6):
        batch, _ = batcher.poll(1e3)
        batcher.run_batch(batch)
        if len(seen) in (2, 3):
            batcher.submit_step(step())
    assert seen == [-3, 2, -1, 2, -1, 1] and batcher.poll(0.0) == ([], None)
    with batcher.preparing():
        batcher.submit([job(10, 0.0)])
        batcher.submit_step(step())
        batcher.stepped = True
        assert isinstance(batcher.poll(0.0)[0][0], Step)     # utterances that wait for more let it pass
    late = step()
    late.has_left = lambda: True
    batcher.run_batch([late, step()])
    assert isinstance(late.outcome.exception(0), web.ClientLeft) and seen[-1] == -1

# ---- monitor: the log ----

def test_a_line_of_the_log_is_a_line_whatever_stands_in_it():  # C193
    fields = {"id": "a.1", "path": "/a b\n2026 INFO \"x\"\u2028", "status": 404, "ms": 1.5}
    text = monitor.log_line("text", 1e9 + 0.0625, "WARNING", "request", fields)
    assert text == ('2001-09-09T01:46:40.062Z WARNING request id=a.1 path="/a b\\n2026 INFO \\"x\\"\\u2028" status=404 '
                    'ms=1.5')
    assert monitor.log_line("text", 1.9995, "INFO", "stop", {}) == "1970-01-01T00:00:01.999Z INFO stop"
    line = monitor.log_line("json", 1e9 + 0.0625, "WARNING", "request", fields)
    assert "\n" not in line and json.loads(line) == {"time": "2001-09-09T01:46:40.062Z", "level": "WARNING",
                                                     "event": "request", **fields}

def test_a_thousand_lines_may_wait_and_a_closed_standard_error_gets_none(monkeypatch):  # C193
    monkeypatch.setattr(sys, "stderr", None)
    log = monitor.Log("text")
    for _ in range(1003):
        log("INFO", "request")
    assert (log.lines.qsize(), log.num_lost, log.descriptor, log.thread.daemon) == (1000, 3, -1, True)
    log.flush(0.0)      # ends, though nobody writes

def test_a_log_that_cannot_be_written_is_said_once_it_can(monkeypatch):  # C193
    """The disk is full for three lines, the second of which goes out in part; others go out 40 bytes at a time."""
    written, room = [], [0]

    def write(descriptor: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        size = min(room[0], len(data), 40)
        room[0] -= size
        written.append(data[:size])
        return size

    monkeypatch.setattr(monitor.os, "write", write)
    log = monitor.Log("json")
    assert log.descriptor == 2
    log.thread.start()
    for space in (0, 9, 0, 10**6, 10**6):
        room[0] = space
        log("INFO", "request", id=space)
        log.flush(PATIENCE)
    half, _, rest = b"".join(written).decode().partition("\n")
    assert half == '{"time": ' and log.thread.is_alive()
    lines = [json.loads(line) for line in rest.splitlines()]
    assert [(line["event"], line.get("lost")) for line in lines] == [("log", 3), ("request", None), ("request", None)]

# ---- model: small models and batches ----

def tiny(kind="transformer", subsampling=1, seed=0, dtype=torch.float64, dropout=0.0, context=0, layers=1, **options):
    """A Paraformer of width 8 for 5 feature bins and 7 tokens, its biases drawn too; firing weights about 0.3."""
    section = config.ModelConfig(
        encoder=config.EncoderConfig(kind, num_layers=2, hidden_dim=8, num_heads=2, kernel_size=3, dropout=dropout,
                                     subsampling=subsampling, context=context),
        predictor=config.PredictorConfig(hidden_dim=6, num_layers=2, dropout=dropout),
        decoder=config.DecoderConfig(num_layers=layers, hidden_dim=8, num_heads=2, dropout=dropout),
        **{"sampling_ratio": 0.5, "ctc_weight": 0.3, **options})
    torch.manual_seed(seed)
    built = checkpoint.build(section, 5, 7).to(dtype)
    for p in built.parameters():
        p.data += 0.2 * torch.randn(p.shape)
    built.predictor.weight.bias.data.fill_(-0.8)
    return built.eval()

def ragged(seed, dtype=torch.float64, width=5):
    """feats (4,13,width), feat_lens, tokens (4,5), token_lens: one without tokens, one with more tokens than frames."""
    token_lens = ints(3, 0, 5, 2)
    tokens = torch.randint(1, 7, (4, 5), generator=torch.Generator().manual_seed(seed)) * padding_mask(token_lens, 5)
    return normal(seed, 4, 13, width, dtype=dtype), ints(13, 7, 2, 10), tokens, token_lens

def one(batch, i):
    """Utterance i of a batch, alone and without padding."""
    feats, feat_lens, tokens, token_lens = batch
    return (feats[i:i + 1, :feat_lens[i]], feat_lens[i:i + 1], tokens[i:i + 1, :token_lens[i]], token_lens[i:i + 1])

@pytest.mark.parametrize("stop", [model.Predictor.forward, scale_weights, cif, glance, model.Decoder.forward,
                                  model.Paraformer.forward])
def test_each_function_of_the_idea_in_ten_minutes_has_at_most_30_lines(stop):
    assert len(inspect.getsource(stop).splitlines()) <= 30

# ---- model: integrate-and-fire ----

def slow_fire(hidden, alpha):
    """Dong & Xu 2020, one frame after the other, of one utterance: the embeddings fired. A weight that is more than the
    unit still needs is split; what is left goes on to the next unit."""
    fired, held, state = [], 0.0, torch.zeros_like(hidden[0])
    for h, left in zip(hidden, alpha.tolist()):
        while held + left >= 1:
            fired.append(state + (1 - held) * h)
            left, held, state = left - (1 - held), 0.0, torch.zeros_like(h)
        held, state = held + left, state + left * h
    return fired

@pytest.mark.parametrize("peak", [0.4, 1.0, 3.5])  # 3.5: more than one token in a frame
def test_cif_equals_the_sequential_loop(peak):  # C21
    hidden, alpha = normal(0, 20, 15, 3), normal(1, 20, 15).sigmoid() * peak
    alpha[::3, 9:] = 0  # padded frames
    total = alpha.sum(1)
    embeds = cif(hidden, alpha, int(total.max()) + 2)
    for b in range(20):
        fired = slow_fire(hidden[b], alpha[b])
        assert len(fired) == int(total[b])
        assert_same(embeds[b, :len(fired)], torch.stack(fired), 1e-9)
        assert not embeds[b, len(fired) + 1:].any()  # the unit at len(fired) holds the rest
    assert_same(cif(torch.ones(20, 15, 1).double(), alpha, int(total.max()) + 1).sum((1, 2)), total)

def test_cif_of_many_units_equals_the_loop_and_the_gradients_of_all_units_at_once(monkeypatch):  # C82
    """Utterances of 300 to 24 tokens in one batch, so that each block of units touches other frames of each of them."""
    hidden = normal(0, 3, 700, 2).requires_grad_()
    alpha = (normal(1, 3, 700).sigmoid() * torch.tensor([[0.9], [2.5], [0.07]])).requires_grad_()
    U = int(alpha.sum(1).max()) + 2
    embeds, found, weights = cif(hidden, alpha, U), [], normal(2, 3, U, 2)
    for units in (model.CIF_UNITS, 10 ** 6):
        monkeypatch.setattr(model, "CIF_UNITS", units)
        found.append(torch.autograd.grad((cif(hidden, alpha, U) * weights).sum(), (hidden, alpha)))
    for b in range(3):
        fired = slow_fire(hidden[b].detach(), alpha[b].detach())
        assert_same(embeds[b, :len(fired)].detach(), torch.stack(fired), 1e-9)
        assert not embeds[b, len(fired) + 1:].any()
    assert U > 5 * 64 and all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*found))

def slow_boundaries(alpha, n):
    """One frame after the other: the times at which the sum passes its (u + 1/2) / n, then the middles between them."""
    centres, held, total = [], 0.0, sum(alpha)
    for t, a in enumerate(alpha):
        while len(centres) < n and held + a >= (len(centres) + 0.5) * total / n:
            centres.append(t + ((len(centres) + 0.5) * total / n - held) / a)
        held += a
    middles = [(a + b) / 2 for a, b in zip(centres, centres[1:])]
    return [max(0.0, 2 * centres[0] - middles[0]), *middles, min(len(alpha), 2 * centres[-1] - middles[-1])]

def test_boundaries_lie_half_way_between_the_peaks():  # C22
    peaks = torch.zeros(14)
    peaks[[2, 6, 11]] = 0.9  # centres 2.5, 6.5, 11.5
    assert_same(boundaries(peaks, 3), torch.tensor([0.5, 4.5, 9.0, 14.0], dtype=torch.float64), 1e-6)
    assert boundaries(peaks, 1).tolist() == [0, 14] and boundaries(peaks, 0).tolist() == [0]
    assert boundaries(0 * peaks, 3).isfinite().all()
    for seed, n in itertools.product(range(5), range(2, 9)):
        alpha = normal(seed, 12).sigmoid()
        assert_same(boundaries(alpha, n), torch.tensor(slow_boundaries(alpha.tolist(), n), dtype=torch.float64), 1e-9)

@pytest.mark.parametrize("kind, factor", [("conformer", 1), ("conformer", 2), ("conformer", 4),
                                          ("relative_conformer", 4)])
def test_an_encoder_frame_stands_at_the_middle_of_the_features_that_it_sees(kind, factor):  # C22
    feats = torch.rand(1, 60, 8, requires_grad=True)
    image = kind == "relative_conformer"
    layer = funasr_layers.ImageSubsampling(8, 4) if image else model.Subsampling(8, 4, factor)
    for parameter in layer.parameters():
        parameter.data.abs_()  # no path is dead
    hidden, _ = layer(feats, ints(60))
    for place in range(2, 12):
        seen = torch.autograd.grad(hidden[0, place].sum(), feats, retain_graph=True)[0][0].any(1).nonzero()[:, 0]
        edges = torch.tensor([place, place + 1], dtype=torch.float64)
        options = SimpleNamespace(kind=kind, subsampling=factor)
        assert model.in_feature_frames(edges, options).mean() == (seen[0] + seen[-1] + 1) / 2

def test_cif_is_differentiable_through_the_scaling():
    hidden, alpha = normal(0, 2, 6, 2).requires_grad_(), normal(1, 2, 6).sigmoid().requires_grad_()
    assert torch.autograd.gradcheck(lambda h, a: cif(h, scale_weights(a, ints(3, 5)), 5), (hidden, alpha))

def last_mass(alpha, counts):
    """The weight that the last of `counts` tokens collects, (B,)."""
    U = int(counts.max())
    return cif(torch.ones(*alpha.shape, 1, dtype=alpha.dtype), alpha, U)[..., 0].gather(1, counts[:, None] - 1)[:, 0]

def test_cif_keeps_the_last_token_in_10000_draws():  # C21 C47
    """Where FunASR loses 22 % (parallel) and 49 % (sequential): shared/FUNASR.md, 5.5."""
    generator = torch.Generator().manual_seed(0)
    lost = 0
    for _ in range(20):
        lens = torch.randint(1, 300, (500,), generator=generator)
        alpha = torch.rand(500, 300, generator=generator) * padding_mask(lens, 300)
        counts = 1 + (torch.rand(500, generator=generator) * lens.clamp(max=25)).long()
        exact, single = scale_weights(alpha, counts), alpha * (counts / alpha.sum(1))[:, None]
        assert exact.dtype == torch.float64
        assert (last_mass(exact, counts) - 1).abs().max() < 1e-9
        lost += int((single.cumsum(1)[:, -1] < counts).sum())  # float32: the sum ends below the last firing
    assert lost > 1000

def test_scaled_weights_sum_to_the_count_and_zeros_stay_zero():
    alpha = torch.tensor([[0.1, 0.3, 0.0], [0.0, 0.0, 0.0], [0.5, 0.5, 0.5]], requires_grad=True)
    scaled = scale_weights(alpha, ints(2, 4, 0))
    assert_same(scaled.detach(), torch.tensor([[0.5, 1.5, 0], [0, 0, 0], [0, 0, 0]], dtype=torch.float64), 1e-7)
    scaled.sum().backward()
    assert alpha.grad.isfinite().all()

# ---- model: lengths and padding ----

def test_subsampling_lengths_are_ceilings_and_its_weights_see_no_padding():  # C1
    for factor in (1, 2, 4):
        layer = model.Subsampling(5, 8, factor).double()
        lens, x = torch.arange(10), normal(0, 10, 9, 5)
        out, out_lens = layer(x, lens)
        assert out_lens.tolist() == [math.ceil(n / factor) for n in range(10)] and out.shape[1] == out_lens.max()
        for i in range(1, 10):
            assert_same(layer(x[i:i + 1, :i], lens[i:i + 1])[0][0], out[i, :out_lens[i]])

@pytest.mark.parametrize("kind, reach", [("transformer", 1 + 2 * 2), ("conformer", 1 + 2 * (2 + 1))])
def test_context_bounds_what_a_frame_sees(kind, reach):
    feats = normal(3, 1, 23, 5).requires_grad_()  # reach: of the subsampling, and in each block of attention and kernel
    hidden, _, _ = tiny(kind, context=2).encoder(feats, ints(23))
    for t in (0, 11, 22):
        seen = torch.autograd.grad(hidden[0, t, 0], feats, retain_graph=True)[0][0].any(1)
        assert seen.tolist() == [abs(s - t) <= reach for s in range(23)]

def test_a_decoder_without_layers_reads_each_embedding_alone():
    decoder, embeds = tiny(layers=0).decoder, normal(3, 1, 6, 8).requires_grad_()
    logits, weights = decoder(embeds, ints(6), normal(4, 1, 9, 8), ints(9), need_weights=True)
    assert weights == []
    for u in range(6):
        seen = torch.autograd.grad(logits[0, u].square().sum(), embeds, retain_graph=True)[0][0].any(1)
        assert seen.nonzero().tolist() == [[u]]

@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("subsampling, context", [(1, 0), (2, 3), (4, 0)])
@pytest.mark.parametrize("kind", ["transformer", "conformer"])
def test_padding_changes_no_loss_and_no_gradient(kind, subsampling, context, train):  # C5
    paraformer, batch = tiny(kind, subsampling, seed=subsampling, context=context).train(train), ragged(1)
    batch[0][~padding_mask(batch[1], 13)] = math.nan  # what pads may hold anything
    hidden, hidden_lens, _ = paraformer.encoder(*batch[:2])
    assert not hidden[~padding_mask(hidden_lens, hidden.shape[1])].any()
    check_padding(paraformer, batch)

def check_padding(paraformer, batch):
    """Losses and gradients of a batch are the sums of those of its utterances; every parameter has a gradient."""
    order = normal(2, 4, 5)
    batch[0][~padding_mask(batch[1], 13)] = math.nan
    sums, tokens = paraformer(*batch, order)
    wanted, total, counted = gradients(paraformer, sums["loss"]), dict.fromkeys(sums, 0.0), 0
    for i in range(4):
        single, n = paraformer(*one(batch, i), order[i:i + 1, :batch[3][i]])
        total, counted = {name: total[name] + value for name, value in single.items()}, counted + n
    assert tokens == counted == 10
    assert_same(total, sums, 1e-6)  # the losses are float32
    got = gradients(paraformer, total["loss"])
    assert got.keys() == wanted.keys() == dict(paraformer.named_parameters()).keys()
    for name in wanted:
        assert (got[name] - wanted[name]).abs().max() <= 1e-5 * wanted[name].abs().max(), name
        assert wanted[name].any(), name

@pytest.mark.parametrize("subsampling", [1, 2, 4])
@pytest.mark.parametrize("kind", ["transformer", "conformer"])
def test_greedy_of_a_batch_equals_greedy_of_each(kind, subsampling):  # C5 C22
    paraformer, seen = tiny(kind, subsampling, dtype=torch.float32), set()
    paraformer.predictor.weight.bias.data.fill_(0.5)
    for seed in range(3):
        feat_lens = torch.randint(1, 24, (6,), generator=torch.Generator().manual_seed(seed))
        feats = normal(seed, 6, 24, 5, dtype=torch.float32)
        feats[~padding_mask(feat_lens, 24)] = math.nan
        batch = paraformer.greedy(feats, feat_lens)
        looks, = paraformer.cross_attention(*paraformer.encode(feats, feat_lens), batch.tokens, batch.lens)
        assert batch.tokens.shape[1] == batch.lens.max()
        for i, T in enumerate(feat_lens.tolist()):
            single = paraformer.greedy(feats[i:i + 1, :T], feat_lens[i:i + 1])
            n = int(single.lens)
            seen.add(n)
            assert int(batch.lens[i]) == n == round(single.alpha.double().sum().item())
            assert torch.equal(single.tokens[0], batch.tokens[i, :n]) and not batch.tokens[i, n:].any()
            assert_same(single.log_probs[0], batch.log_probs[i, :n], 1e-5)
            assert not batch.log_probs[i, n:].any()
            edges = batch.boundaries[i]
            assert len(edges) == n + 1 and (edges.diff() >= 0).all() and 0 <= edges[0] and edges[-1] <= T
            assert_same(single.boundaries[0], edges, 1e-4)
            wanted = boundaries(single.alpha[0], n) * subsampling - (subsampling - 1) / 2
            assert_same(edges, wanted.clamp(0, T), 1e-4)
            hidden, lens, _ = paraformer.encoder(feats[i:i + 1, :T], feat_lens[i:i + 1])
            embeds = cif(hidden, scale_weights(single.alpha, single.lens), n)
            logits, _ = paraformer.decoder(embeds, single.lens, hidden, lens)
            assert_same(single.log_probs, logits.log_softmax(-1).amax(-1), 1e-5)
            assert_same(looks[i, :, :n].sum(-1), torch.ones(2, n), 1e-5)
    assert len(seen) > 2

# ---- model: the glancing sampler ----

@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_glance_replaces_the_floor_of_ratio_times_wrong_by_order(ratio):  # C23
    B, U, counts = 200, 9, torch.arange(200) % 10
    order = normal(0, B, U)
    wrong = (torch.rand(B, generator=torch.Generator().manual_seed(1)) * (counts + 1)).long()
    embeds, truth = torch.zeros(B, U, 3), torch.ones(B, U, 3)
    replaced = glance(embeds, truth, counts, wrong, ratio, order).bool()
    assert (replaced == replaced[:, :, :1]).all() and not embeds.any()
    for b in range(B):
        ranked = sorted(range(int(counts[b])), key=order[b].tolist().__getitem__)
        assert replaced[b, :, 0].nonzero()[:, 0].tolist() == sorted(ranked[:math.floor(ratio * int(wrong[b]))])

def by_hand(paraformer, batch, order):
    """The cross-entropy of the second pass, token by token, with the first pass run on detached embeddings."""
    feats, feat_lens, tokens, token_lens = batch
    hidden, lens, _ = paraformer.encoder(feats, feat_lens)
    embeds = cif(hidden, scale_weights(paraformer.predictor(hidden, lens), token_lens), tokens.shape[1])
    first = paraformer.decoder(embeds.detach(), token_lens, hidden.detach(), lens)[0].detach()
    mixed = [list(row) for row in embeds]
    for b, n in enumerate(token_lens.tolist()):
        wrong = sum(int(first[b, u].argmax()) != int(tokens[b, u]) for u in range(n))
        for u in sorted(range(n), key=order[b].tolist().__getitem__)[:int(paraformer.options.sampling_ratio * wrong)]:
            mixed[b][u] = paraformer.embedding.weight[tokens[b, u]]
    logits = paraformer.decoder(torch.stack([torch.stack(row) for row in mixed]), token_lens, hidden, lens)[0]
    return sum(cross_entropy_sum(logits[b:b + 1, :n], tokens[b:b + 1, :n], token_lens[b:b + 1], 0.1)
               for b, n in enumerate(token_lens.tolist()))

@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_only_the_second_pass_gives_gradient(ratio):  # C23
    paraformer, batch, order = tiny(sampling_ratio=ratio), ragged(3), normal(4, 4, 5)
    sums, _ = paraformer(*batch, order)
    got, by_hand_loss = gradients(paraformer, sums["ce"]), by_hand(paraformer, batch, order)
    assert_same(sums["ce"], by_hand_loss, 1e-6)
    wanted = gradients(paraformer, by_hand_loss)
    assert wanted.get("embedding.weight", torch.zeros(1)).any() == (ratio > 0)
    for name in wanted:
        assert_same(got[name], wanted[name], 1e-6)

# ---- model: losses ----

@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
def test_cross_entropy_is_the_divergence_from_the_smoothed_target(smoothing):  # C24
    logits, tokens, lens = normal(0, 3, 4, 6).requires_grad_(), torch.arange(12).reshape(3, 4) % 6, ints(4, 0, 2)
    q = torch.full((3, 4, 6), smoothing / 5, dtype=torch.float64).scatter(2, tokens[:, :, None], 1 - smoothing)
    wanted = F.kl_div(logits.log_softmax(-1), q, reduction="none").sum(-1)[padding_mask(lens, 4)].sum()
    got = cross_entropy_sum(logits, tokens, lens, smoothing)
    assert_same(got.double(), wanted, 1e-6)
    assert_same(*(torch.autograd.grad(x, logits)[0] for x in (got, wanted)), 1e-6)
    assert abs(cross_entropy_sum(q.clamp(min=1e-30).log(), tokens, lens, smoothing)) < 1e-5

def test_ctc_equals_the_sum_over_all_paths():  # C24
    logits, lens = normal(0, 3, 4, 3), ints(4, 3, 1)
    tokens, token_lens = torch.tensor([[1, 1], [2, 0], [1, 2]]), ints(2, 1, 2)
    wanted = 0.0
    for b in range(2):  # the third cannot fit its frame and gives 0
        p = logits[b].softmax(-1)
        paths = itertools.product(range(3), repeat=int(lens[b]))
        wanted -= math.log(sum(math.prod(float(p[t, s]) for t, s in enumerate(path)) for path in paths
                               if [s for s, _ in itertools.groupby(path) if s] == tokens[b, :token_lens[b]].tolist()))
    assert float(ctc_sum(logits, lens, tokens, token_lens)) == pytest.approx(wanted, rel=1e-5)

@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_the_loss_is_the_weighted_total_of_its_parts(weight):  # C24
    paraformer, batch = tiny(ctc_weight=weight, quantity_weight=2.0), ragged(5)
    sums, tokens = paraformer(*batch)
    hidden, lens, _ = paraformer.encoder(*batch[:2])
    alpha = paraformer.predictor(hidden, lens)
    wanted = sum(abs(alpha[b, :lens[b]].sum().item() - int(batch[3][b])) for b in range(4))
    assert sums["quantity"].item() == pytest.approx(wanted, rel=1e-6) and int(tokens) == 10
    assert ("ctc" in sums) == (paraformer.ctc is not None) == (weight > 0)
    ctc = ctc_sum(paraformer.ctc(hidden), lens, *batch[2:]) if weight else 0.0
    assert_same(sums["loss"], (1 - weight) * sums["ce"] + 2 * sums["quantity"] + weight * ctc, 1e-6)
    assert paraformer.total({"timing": torch.tensor(3.0)})["loss"] == 2 / 2 * 3

def test_minimum_word_error_rate_on_planted_candidates():  # C69
    """The text is 1 2 of ids 0 1 2; the model prefers 2 to 1 at the first place, p to q, and 2 to 0 at the second."""
    p, q, r, s = 0.6, 0.3, 0.8, 0.15
    logits = torch.tensor([[[1 - p - q, q, p], [s, 1 - r - s, r], [0.5, 0.3, 0.2]], [[0.9, 0.05, 0.05]] * 3]).log()
    logits.requires_grad_()
    masked = torch.tensor([[True, True, True], [True, False, True], [False, True, False]]).expand(2, 3, 3)
    tokens, lens = torch.tensor([[1, 2, 0], [0, 0, 0]]), ints(2, 0)
    weights, errors = [p * r, q * r, p * s], [1, 0, 2]  # 2 2, 1 2, 2 0; what pads and candidate 0 are never masked
    wanted = sum(w * (e - 1) for w, e in zip(weights, errors)) / sum(weights)
    loss = model.mwer_sum(logits, tokens, lens, masked)
    loss.backward()
    assert loss.item() == pytest.approx(wanted, rel=1e-6)
    step = -logits.grad[0, :2]
    assert step[0, 1] > 0 > step[0, 2] and step[1, 2] > 0 > step[1, 0]  # down the gradient the true tokens win
    assert not logits.grad[1].any() and not logits.grad[0, 2].any()

def test_mwer_is_a_weighted_part_of_the_loss_and_stays_when_a_checkpoint_gives_the_model(monkeypatch):  # C69
    with_it, batch = tiny(mwer_weight=2.0, mwer_samples=16), ragged(5)
    torch.manual_seed(7)
    order = torch.rand(4, 5)
    sums, _ = with_it(*batch, order)
    plain, _ = tiny()(*batch, order)
    assert "mwer" not in plain and sums["mwer"].item() != 0
    assert_same(sums["loss"], plain["loss"] + 2 * sums["mwer"], 1e-5)
    masks = []
    monkeypatch.setattr(model, "mwer_sum", lambda *arguments: masks.append(arguments[3]) or torch.zeros(()))
    tiny(mwer_weight=2.0, mwer_samples=500)(*batch, order)
    assert masks[0].double().mean().item() == pytest.approx(0.2, abs=0.015)

# ---- model: edges, and all of it ----

@pytest.mark.parametrize("subsampling", [1, 4])
def test_an_utterance_without_tokens_trains_its_count_only(subsampling):  # C25
    paraformer, (feats, feat_lens, _, _) = tiny(subsampling=subsampling, ctc_weight=0.0, quantity_weight=2.0), ragged(6)
    sums, tokens = paraformer(feats, feat_lens, torch.zeros(4, 0, dtype=torch.int64), ints(0, 0, 0, 0))
    hidden, lens, _ = paraformer.encoder(feats, feat_lens)
    assert tokens == 0 and sums["ce"] == 0
    assert_same(sums["loss"], 2 * paraformer.predictor(hidden, lens).sum(), 1e-6)
    assert all(g.isfinite().all() for g in gradients(paraformer, sums["loss"]).values())

def test_a_target_longer_than_the_frames_has_all_its_embeddings_and_a_finite_loss():  # C25
    paraformer, hidden, alpha = tiny(), normal(0, 1, 2, 8), torch.tensor([[0.3, 0.1]])
    embeds = cif(hidden, scale_weights(alpha, ints(6)), 6)  # 4.5 and 1.5 units
    half = hidden.mean(1)[0]
    assert_same(embeds[0], torch.stack([hidden[0, 0]] * 4 + [half] + [hidden[0, 1]]), 1e-6)
    sums, _ = paraformer(normal(1, 1, 2, 5), ints(2), torch.arange(1, 7)[None], ints(6))
    assert sums["ctc"] == 0 and sums["ce"] > 0
    assert all(g.isfinite().all() for g in gradients(paraformer, sums["loss"]).values())

@pytest.mark.parametrize("subsampling", [1, 2, 4])
def test_greedy_without_a_token_is_empty(subsampling):  # C25
    paraformer, (feats, feat_lens, _, _) = tiny(subsampling=subsampling), ragged(7)
    feat_lens[1] = 0
    mixed = paraformer.greedy(feats, feat_lens)
    assert mixed.lens[1] == 0 < mixed.lens[0] and not mixed.tokens[1].any() and mixed.boundaries[1].tolist() == [0]
    paraformer.predictor.weight.bias.data.fill_(-200.0)
    empty = paraformer.greedy(feats, feat_lens)
    assert empty.lens.tolist() == [0] * 4 and empty.tokens.tolist() == empty.log_probs.tolist() == [[]] * 4
    assert [edges.tolist() for edges in empty.boundaries] == [[0]] * 4 and empty.alpha.isfinite().all()
    assert paraformer.count(torch.tensor([[2.0, 0.49], [2.0, 0.5]])).tolist() == [2, 3]
    nobody = paraformer.greedy(feats[:0], feat_lens[:0])
    assert nobody.tokens.tolist() == nobody.lens.tolist() == []

@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_features_raise_in_greedy_and_spoil_the_training_loss(value):  # C25
    paraformer, batch = tiny(), ragged(8)
    batch[0][[0, 3], [12, 9], 2] = value  # the last real frames
    refused(r"feats must be finite, got NaN or infinity in utterances \[0, 3\]", paraformer.greedy, *batch[:2])
    sums, _ = paraformer(*batch)
    assert not any(x.isfinite() for x in sums.values())

FEATS, HIDDEN, ALPHA = torch.zeros(2, 6, 5), torch.zeros(2, 4, 8), torch.zeros(2, 4)
LENS, TOKENS, TOKEN_LENS, LOGITS = ints(4, 3), torch.zeros(2, 3).long(), ints(3, 2), torch.zeros(2, 3, 7)
DENSE = config.PredictorConfig(kind="dense", upsampling=3)
SANM = config.DecoderConfig(kind="sanm", hidden_dim=8, num_heads=2, num_layers=1)
NARROW = config.EncoderConfig(hidden_dim=4, num_heads=2, ffn_dim=8, kernel_size=3)
PAIR = X[:, None]  # (B,H,T,K)
DECODED = dict(embeds=HIDDEN, counts=LENS, hidden=HIDDEN, hidden_lens=LENS)
TAKEN = {  # what takes tensors (of a tiny model m) -> tensors that it takes, by their names in errors
    attend: dict(q=PAIR, k=PAIR, v=PAIR, mask=None, need_weights=False),
    MultiHeadAttention(4, 2): dict(x=X, source=X, mask=MASK), PositionalEncoding(4): dict(x=X),
    attention.zero_padding: dict(x=X, mask=MASK),
    FeedForward(4, 6): dict(x=X), TransformerBlock(NARROW): dict(x=X, mask=MASK),
    ConvolutionModule(4, 3): dict(x=X, mask=MASK), ConformerBlock(NARROW): dict(x=X, mask=MASK),
    funasr_layers.relative_codes: dict(lens=TOKEN_LENS, T=3, dim=4),
    funasr_layers.relative_shift: dict(scores=torch.zeros(2, 1, 3, 3), lens=TOKEN_LENS),
    funasr_layers.RelativeAttention(4, 2, 0.0): dict(x=X, codes=X, lens=TOKEN_LENS),
    funasr_layers.RelativeConformerBlock(NARROW): dict(x=X, mask=MASK, codes=X, lens=TOKEN_LENS),
    funasr_layers.Fsmn(4, 3): dict(x=X, mask=MASK), funasr_layers.SanmBlock(4, NARROW): dict(x=X, mask=MASK),
    functools.partial(funasr_layers.SanmDecoderBlock(NARROW), hidden=X, hidden_mask=MASK): dict(x=X, mask=MASK),
    funasr_layers.ImageSubsampling(8, 8): dict(x=HIDDEN, lens=LENS),
    funasr_layers.FramePredictor(8, DENSE): dict(hidden=HIDDEN, lens=LENS),
    funasr_layers.TimingHead(8, DENSE): dict(hidden=HIDDEN, lens=LENS), funasr_layers.SanmDecoder(8, 7, SANM): DECODED,
    "m.forward": dict(feats=FEATS, feat_lens=LENS, tokens=TOKENS, token_lens=TOKEN_LENS, order=torch.zeros(2, 3)),
    "m.greedy": dict(feats=FEATS, feat_lens=LENS), "m.encoder.subsampling": dict(x=FEATS, lens=LENS),
    "m.predictor": dict(hidden=HIDDEN, lens=LENS), "m.decoder": DECODED,
    "m.targets": dict(tokens=TOKENS, token_lens=TOKEN_LENS), "m.truth": dict(tokens=TOKENS),
    "m.integrate": dict(alpha=ALPHA, hidden=HIDDEN), "m.decode": dict(hidden=HIDDEN, hidden_lens=LENS, feat_lens=LENS),
    scale_weights: dict(alpha=ALPHA, counts=LENS), cif: dict(alpha=ALPHA, hidden=HIDDEN, U=2),
    boundaries: dict(alpha=ALPHA[0], n=2),
    glance: dict(embeds=HIDDEN, truth=HIDDEN, counts=LENS, wrong=LENS, ratio=1.0, order=ALPHA),
    cross_entropy_sum: dict(logits=LOGITS, tokens=TOKENS, lens=TOKEN_LENS, smoothing=0.1),
    ctc_sum: dict(logits=LOGITS, lens=ints(3, 3), tokens=TOKENS, token_lens=TOKEN_LENS)}

@pytest.mark.parametrize("call", TAKEN)
@torch.no_grad()
def test_tensors_of_another_shape_are_refused_by_name(call):  # C1 C7
    """With a dimension less; another number of utterances than the first one has; for a module, of another width."""
    arguments = TAKEN[call]
    if isinstance(call, str):
        call = functools.reduce(getattr, call.split(".")[1:], tiny(dtype=torch.float32))
    call(**arguments)
    first, *others = [key for key, value in arguments.items() if isinstance(value, torch.Tensor)]
    wrong = [(key, arguments[key][0]) for key in (first, *others)]
    wrong += [(key, arguments[key][:1]) for key in others]
    if isinstance(call, nn.Module):
        wrong.append((first, arguments[first][..., :-1]))
    for key, x in wrong:
        message = message_of(call, **{**arguments, key: x})
        name = re.search(r"(\w+) must be \(", message)[1]
        assert key.endswith(name) and f"got {tuple(x.shape)}" in message  # hidden_lens may be called lens

@pytest.mark.parametrize("call, message", [
    (lambda m: m(FEATS[:, :0], ints(0, 0), TOKENS, TOKEN_LENS), "at least one frame, got (2, 0, 5)"),
    (lambda m: m(FEATS, ints(4, 7), TOKENS, TOKEN_LENS), "feat_lens must lie in 0..6, got [4, 7]"),
    (lambda m: m(FEATS, LENS, TOKENS, ints(3, 4)), "token_lens must lie in 0..3, got [3, 4]"),
    (lambda m: m(FEATS, LENS, TOKENS, TOKEN_LENS.float()), "(2,) int64, got (2,) torch.float32"),
    (lambda m: m(FEATS, LENS, TOKENS, TOKEN_LENS, ALPHA), "order must be (2,3), got (2, 4)"),
    (lambda m: ctc_sum(LOGITS, ints(4, 3), TOKENS, ints(3, 3)), "lens must lie in 0..3, got [4, 3]"),
    (lambda m: ctc_sum(LOGITS, ints(3, 3), TOKENS, ints(4, 3)), "token_lens must lie in 0..3"),
    (lambda m: funasr_layers.TimingHead(8, DENSE)(HIDDEN, ints(4, 5)), "lens must lie in 0..4, got [4, 5]"),
    (lambda m: m.decode(HIDDEN, ints(4, 5), LENS), "lens must lie in 0..4, got [4, 5]"),
    (lambda m: model.Subsampling(5, 8, 3), "subsampling must be one of [1, 2, 4], got 3"),
    (lambda m: tiny("rnn"),
     "encoder.kind must be one of ['transformer', 'conformer', 'sanm', 'relative_conformer'], got 'rnn'"),
    (lambda m: checkpoint.build(config.ModelConfig(name="x"), 5, 7),
     "must be one of ['paraformer', 'streaming', 'seaco', 'contextual', 'transformer', 'ctc'], got 'x'")])
def test_model_errors_name_what_was_wanted_and_got(call, message):  # C1 C7
    assert message in message_of(call, tiny(dtype=torch.float32))

def planted(generator, n):
    """Each token, 1 or 2, is 1 to 3 frames of its own bin and a silent frame: feats, feat_lens, tokens, token_lens."""
    def draw(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    texts = [draw(1, 3, int(draw(1, 5))) for _ in range(n)]
    feats = [3 * torch.eye(3)[torch.cat([torch.tensor([s] * int(draw(1, 4)) + [0]) for s in text.tolist()])]
             for text in texts]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(feats, True), ints(*map(len, feats)), pad(texts, True), ints(*map(len, texts))

def test_a_small_model_learns_a_planted_task_to_the_last_sequence():
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    section = config.ModelConfig(encoder=config.EncoderConfig(num_layers=1, hidden_dim=32, num_heads=2, dropout=0.0),
                                 predictor=config.PredictorConfig(hidden_dim=32, num_layers=1, dropout=0.0),
                                 decoder=config.DecoderConfig(num_layers=1, hidden_dim=32, num_heads=2,
                                                             dropout=0.0))
    paraformer = checkpoint.build(section, 3, 3)
    optimizer = torch.optim.Adam(paraformer.parameters())
    for step in range(120):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 120)
        sums, tokens = paraformer(*planted(generator, 16))
        optimizer.zero_grad()
        (sums["loss"] / tokens).backward()
        optimizer.step()
    feats, feat_lens, tokens, token_lens = planted(generator, 100)
    found = paraformer.eval().greedy(feats, feat_lens)
    right = [found.tokens[i, :found.lens[i]].tolist() == tokens[i, :token_lens[i]].tolist() for i in range(100)]
    assert sum(right) == 100

# ---- corpora: manifests of corpora and folders ----

def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]

def test_fsdd_keeps_test_recordings_and_the_held_out_speaker_apart(tmp_path):
    """Recordings are tones whose pitch tells their split; every composed utterance must hold its own split's pitch."""
    pitch = {"test": 500, "dev": 900, "train": 1500, "unseen_speaker": 2500}
    (tmp_path / "fsdd/recordings").mkdir(parents=True)
    for digit, speaker, index in itertools.product(range(10), ("ann", "bob"), (0, 4, 5, 9, 10, 49)):
        split = "test" if index < 5 else "dev" if index < 10 else "train"
        rate_hz = 16000 if digit == 3 else 8000
        samples = tone(0.1 + 0.02 * digit, rate_hz, pitch["unseen_speaker" if speaker == "bob" else split])
        audio.save_wav(tmp_path / f"fsdd/recordings/{digit}_{speaker}_{index}.wav", samples, rate_hz)
    for out in ("a", "b"):
        assert corpora.main(["fsdd", str(tmp_path / "fsdd"), str(tmp_path / out), "--hold-out-speaker", "bob",
                          "--utterances", "12", "6", "6", "6"]) == 0
    rows = [row for split in pitch for row in rows_of(tmp_path / f"a/{split}.jsonl")]
    assert {len(row["text"].split()) for row in rows} == set(range(3, 8))
    assert corpora.main(["fsdd", str(tmp_path / "fsdd"), str(tmp_path / "c"), "--utterances", "1", "0", "1", "0"]) == 0
    assert sorted(path.name for path in (tmp_path / "c").glob("*.jsonl")) == ["test.jsonl", "train.jsonl"]
    for split, size in zip(pitch, (6, 6, 12, 6)):
        rows = rows_of(tmp_path / f"a/{split}.jsonl")
        assert len(rows) == size and len({row["text"] for row in rows}) > 1
        for row in rows:
            samples, rate_hz = audio.load_wav(tmp_path / "a" / row["audio"])
            power = torch.fft.rfft(samples).abs().square()
            near = (torch.arange(len(power)) * rate_hz / len(samples) - pitch[split]).abs() < 100
            assert power[near].sum() > 0.95 * power.sum()
            digits = [corpora.DIGITS.index(word) for word in row["text"].split()]
            gaps = len(samples) / rate_hz - sum(0.1 + 0.02 * digit for digit in digits)
            assert 3 <= len(digits) <= 7 and 0.06 <= gaps / (len(digits) + 1) <= 0.25
            assert row["duration"] == pytest.approx(len(samples) / rate_hz, abs=1e-4)
            assert row["speaker"] == ("bob" if split == "unseen_speaker" else "ann")
            assert (tmp_path / "b" / row["audio"]).read_bytes() == (tmp_path / "a" / row["audio"]).read_bytes()

@pytest.mark.parametrize("stop, code, words", [
    (KeyboardInterrupt(), 130, "stopped before {out} had all its manifests"),
    (OSError(errno.ENOSPC, "Full"), 2, "[Errno 28] Full: '{out}/wav/train/train_0000.wav'")])
def test_an_interrupted_corpus_leaves_no_manifest_of_other_recordings(tmp_path, capsys, monkeypatch, stop, code, words):
    def break_off(path: Path, samples: np.ndarray, rate_hz: int) -> None:
        path.write_bytes(b"RI")
        raise stop

    out, audio_file = tmp_path / "out", tmp_path / "out/wav/train/train_0000.wav"
    audio.save_wav(tmp_path / "1_ann_10.wav", tone(0.1, 8000), 8000)
    command = ["fsdd", str(tmp_path), str(out), "--utterances", "1", "0", "0", "0"]
    assert corpora.main(command) == 0 and len(rows_of(out / "train.jsonl")) == 1
    before = audio_file.read_bytes()
    monkeypatch.setattr(corpora, "save_wav", break_off)
    assert corpora.main([*command, "--seed", "1"]) == code
    assert capsys.readouterr().err == f"corpora.py: {words.format(out=out)}\n"
    assert list(out.rglob("*.*")) == [audio_file] and audio_file.read_bytes() == before     # nothing half-written

def test_composed_digits_are_as_loud_as_said_with_noise_and_fades_as_said():
    """A recording of ones: its gain is of -9 to 3 dB and a deviation of 2, its edges rise within 5 ms. And silence."""
    levels, floors, rng = [], [], np.random.default_rng(0)
    for _ in range(1500):
        x = corpora.join_digits([np.ones(400)], 8000, rng)
        middle = np.flatnonzero(x > x.max() / 2)
        levels.append(20 * np.log10(np.median(x[middle])))
        assert 355 < len(middle) < 365                      # 400 samples but for half of each edge of 40
        floors.append(20 * np.log10(np.std(corpora.join_digits([np.zeros(4000)], 8000, rng))))
    assert abs(np.mean(levels) + 3) < 0.2 and abs(np.var(levels) - 4 - 12) < 1
    assert -66 < min(floors) < -64.5 and -45.5 < max(floors) < -44
    x = corpora.join_digits([np.ones(400), np.ones(60)], 8000, np.random.default_rng(0))
    assert (len(x), np.square(x).sum()) == (3340, pytest.approx(611.238881, rel=1e-6))  # a number of this code

def test_public_corpora_layouts_become_manifests(tmp_path, capsys):
    libri, shell, pairs = tmp_path / "LibriSpeech", tmp_path / "data_aishell", tmp_path / "pairs"
    for folder in (libri / "dev-clean/84/121123", shell / "wav/train/S01", shell / "transcript", pairs / "deep"):
        folder.mkdir(parents=True)
    (libri / "dev-clean/84/121123/84-121123.trans.txt").write_text("84-121123-0000 GO  ON\n84-121123-0001 STOP\n")
    stream = (16000 << 44) | (15 << 36) | 24000
    header = b"fLaC\0\0\0\x22" + bytes(10) + stream.to_bytes(8, "big")
    (libri / "dev-clean/84/121123/84-121123-0000.flac").write_bytes(header)
    (shell / "transcript/aishell_transcript_v0.8.txt").write_text("K1 而 对 楼市\n", encoding="utf-8")
    for key in ("K1", "K2"):
        audio.save_wav(shell / f"wav/train/S01/{key}.wav", tone(0.25, 16000), 16000)
    for i in range(10):
        audio.save_wav(pairs / f"deep/n{i}.wav", tone(0.1, 8000), 8000)
        (pairs / f"deep/n{i}.txt").write_text(f"text\n{i}\n")
    audio.save_wav(pairs / "alone.wav", tone(0.1, 8000), 8000)
    (pairs / "a folder.wav").mkdir()
    (pairs / "a folder.txt").write_text("no text of a recording")
    assert corpora.main(["librispeech", str(libri), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.endswith("dev-clean.jsonl: 1 of them cannot be read and will be skipped: "
                                            "../LibriSpeech/dev-clean/84/121123/84-121123-0001.flac\n")
    assert corpora.main(["aishell", str(shell), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.endswith(
        "train.jsonl: 1 utterances, 0.2 s\nleft out 1, without text: ../data_aishell/wav/train/S01/K2.wav\n")
    assert rows_of(tmp_path / "out/dev-clean.jsonl") == [
        {"audio": "../LibriSpeech/dev-clean/84/121123/84-121123-0000.flac", "text": "GO ON", "speaker": "84",
         "key": "84-121123-0000", "duration": 1.5},
        {"audio": "../LibriSpeech/dev-clean/84/121123/84-121123-0001.flac", "text": "STOP", "speaker": "84",
         "key": "84-121123-0001"}]                                  # no file: no duration
    assert rows_of(tmp_path / "out/train.jsonl") == [
        {"audio": "../data_aishell/wav/train/S01/K1.wav", "text": "而对楼市", "speaker": "S01", "key": "K1",
         "duration": 0.25}]
    assert "而对楼市" in (tmp_path / "out/train.jsonl").read_text("utf-8")
    assert corpora.main(["folder", str(pairs), str(tmp_path / "out"), "--dev-share", "0.2", "--test-share", "0.3"]) == 0
    found = {split: rows_of(tmp_path / f"out/{split}.jsonl") for split in ("train", "dev", "test")}
    assert sorted(row["text"] for rows in found.values() for row in rows) == [f"text {i}" for i in range(10)]
    assert [len(found[split]) for split in ("train", "dev", "test")] == [5, 2, 3]       # of those with a text, exactly
    assert all(row["text"][-1] == row["key"][-1] for rows in found.values() for row in rows)
    assert not [name for name in os.listdir(tmp_path / "out") if not name.endswith(".jsonl")]
    assert capsys.readouterr().err == ""
    # no test set: its recordings go to train
    assert corpora.main(["folder", str(pairs), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == (f"corpora.py: {tmp_path / 'out/test.jsonl'}: not of this run, whose manifests "
                                       "may list the same recordings\n")

def test_manifests_in_a_linked_folder_name_their_recordings(tmp_path):
    (tmp_path / "far/deep").mkdir(parents=True)
    (tmp_path / "out").symlink_to("far/deep")
    (tmp_path / "pairs").mkdir()
    audio.save_wav(tmp_path / "pairs/a.wav", tone(0.1, 8000)[:777], 8000)
    (tmp_path / "pairs/a.txt").write_text("one")
    for out in ("out", "new/folder"):
        assert corpora.main(["folder", str(tmp_path / "pairs"), str(tmp_path / out), "--dev-share", "0"]) == 0
    for folder in (tmp_path / "out", tmp_path / "far/deep", tmp_path / "new/folder"):
        (row,) = rows_of(folder / "train.jsonl")
        assert (folder / row["audio"]).exists() and row["duration"] == 0.0971   # 777 / 8000

@pytest.mark.parametrize("arguments,words", [
    (["fsdd", "gone", "out"], "gone: wanted the corpus's folder"), (["librispeech", ".", "out"], "wanted recordings"),
    (["fsdd", ".", "out", "--hold-out-speaker", "eve"], "eve"), (["aishell", ".", "out"], "aishell_transcript_v0.8"),
    (["folder", ".", "out", "--dev-share", "0.6", "--test-share", "0.5"], "together at most 1, got 0.6 and 0.5"),
    (["folder", ".", "out", "--dev-share=-0.1"], "--dev-share, --test-share: wanted 0 or more"),
    (["folder", ".", "out", "--test-share", "nan"], "--dev-share, --test-share: wanted 0 or more"),
    (["fsdd", ".", "out", "--utterances", "-1", "5", "5", "5"], "--utterances: wanted 0 or more each, got [-1, 5,"),
    (["fsdd", ".", "out", "--seed", "-1"], "--seed: wanted 0 or more, got -1")])
def test_bad_input_to_a_subcommand_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, words):  # C34
    monkeypatch.chdir(tmp_path)
    assert corpora.main(arguments) == 2
    error = capsys.readouterr().err
    for wrong in ([], ["nonsense"], ["fsdd", "a", "b", "--seed=x\ny"], ["folder", "", "b"], ["folder", "a", ""]):
        with pytest.raises(SystemExit, match="2"):
            corpora.main(wrong)
        said = capsys.readouterr().err
        assert "corpora.py" in said and said.count("\n") == 1
    assert error.startswith("corpora.py: ") and error.count("\n") == 1 and words in error
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.jsonl"))

# ---- funasr: options and files ----

@pytest.mark.parametrize("variant", (*VARIANTS, "streaming", "streaming_alt"))
def test_a_published_config_survives_a_round_trip(variant, tmp_path):  # C36
    found = funasr.read_published_config(kit(variant, "config.yaml"))
    path = written(tmp_path, funasr.dump_published_config(found))
    assert funasr.read_published_config(path) == found

@pytest.mark.parametrize("kit, old, new, words", [
    ("sanm", "model: Paraformer", "model: Transducer", "model 'Transducer' is not implemented"),
    ("sanm", "encoder: SANMEncoder", "encoder: SANMVadEncoder", "encoder 'SANMVadEncoder' is not implemented"),
    ("sanm", "frontend: WavFrontend", "frontend: WavFrontendOnline", "frontend WavFrontendOnline is not implemented "
     "for a Paraformer; wanted ParaformerStreaming, SANMEncoderChunkOpt, WavFrontendOnline together"),
    ("sanm", "model: Paraformer", "model: ParaformerStreaming",
     "encoder SANMEncoder is not implemented for a ParaformerStreaming"),
    ("sanm", "predictor: CifPredictorV2", "predictor: Pif", "predictor 'Pif' is not implemented"),
    ("sanm", "  input_layer: pe\n", "", "encoder_conf.input_layer 'conv2d' is not implemented; wanted 'pe'"),
    ("conformer", "  macaron_style: true\n", "", "encoder_conf.macaron_style false is not implemented; wanted true"),
    ("bicif", "  use_cif1_cnn: false\n", "", "predictor_conf.use_cif1_cnn true is not implemented; wanted false"),
    ("sanm", "  threshold: 1.0", "  threshold: 1.0\n  smooth_factor: 1.1",
     "predictor_conf.smooth_factor 1.1 is not implemented"),
    ("sanm", "window: hamming", "window: povey", "frontend_conf.window 'povey' is not implemented"),
    ("sanm", "tokenizer: CharTokenizer", "tokenizer: SentencepiecesTokenizer",
     "tokenizer 'SentencepiecesTokenizer' is not"),
    ("seaco", "  inner_dim: 32", "  inner_dim: 64",
     "model_conf.inner_dim: wanted the encoder's output_size 32, got 64"),
    ("seaco", "  inner_dim: 32\n", "", "model_conf.inner_dim: wanted the encoder's output_size 32, got 256"),
    ("seaco", "bias_encoder_type: lstm", "bias_encoder_type: mean",
     "model_conf.bias_encoder_type 'mean' is not implemented; wanted 'lstm'"),
    ("seaco", "  train_decoder: false", "  train_decoders: false",
     "model_conf.train_decoders is not implemented for a SeacoParaformer"),
    ("seaco", "  wo_input_layer: true\n", "",
     "seaco_decoder_conf.wo_input_layer false is not implemented; wanted true"),
    ("seaco", "  use_output_layer: false\n", "", "use_output_layer true is not implemented; wanted false"),
    ("seaco", "  wo_input_layer: true", "  wo_input_layers: true", "seaco_decoder_conf.wo_input_layer"),
    ("seaco", "seaco_decoder: ParaformerSANMDecoder\n", "",
     "wanted FunASR's 'seaco_decoder: CLASS' and 'seaco_decoder_conf: options'"),
    ("seaco", "  num_blocks: 4\n", "  num_blocks: 4\n  att_layer_num: 3\n",
     "model.hotwords.decoder.attention_layers: wanted 6 or more"),
    ("seaco", "\ndecoder: ParaformerSANMDecoder", "\ndecoder: ContextualParaformerDecoder",
     "decoder ContextualParaformerDecoder is not implemented for a SeacoParaformer; wanted ParaformerSANMDecoder"),
    ("seaco", "NO_BIAS: 54", "NO_BIAS: 58", "model.hotwords.no_bias: wanted a token below 58, got 58"),
    ("vad", "model: FsmnVADStreaming", "model: Paraformer", "wanted model FsmnVADStreaming, got Paraformer"),
    ("vad", "  lfr_m: 5", "  lfr_m: 7", "lfr_m: wanted 5, got 7"),
    ("vad", "  silence_pdf_num: 1", "  silence_pdf_num: 2", "silence_pdf_num: wanted the 1 of sil_pdf_ids, got 2"),
    ("vad", "  sample_rate: 16000", "  sample_rate: 8000", "wanted one sample rate, got 8000 and 16000"),
    ("vad", "  detect_mode: 1", "  mode: 1", "unknown key 'mode'"),
    ("vad", "  input_dim: 400", "  input_dim: 320", "encoder_conf.input_dim: wanted n_mels x lfr_m 400, got 320"),
    ("vad", "  proj_dim: 16", "  proj_dim: 17", "not fit the model of its config: encoder.fsmn.0.linear.linear.weight"),
    ("punc", "model: CTTransformer", "model: Paraformer", "wanted model CTTransformer or CTTransformerStreaming"),
    ("punc", "encoder: SANMEncoder", "encoder: SANMVadEncoder", "got CTTransformer with SANMVadEncoder"),
    ("punc", "  att_unit: 32", "  att_unit: 64", "embed_unit, att_unit and output_size alike, got 32, 64 and 32"),
    ("punc", "  sentence_end_id: 3", "  sentence_end_id: 6", "wanted a punc_list with _ and sentence_end_id in it"),
    ("punc", "  - _\n", "  - ！\n", "wanted a punc_list with _ and sentence_end_id in it"),
    ("punc", "  linear_units: 48", "  linear_units: 40", "weights do not fit the model of its config: "),
    ("punc", "  input_layer: pe", "  input_layer: linear", "encoder_conf.input_layer 'linear' is not implemented")])
def test_what_is_not_implemented_is_refused_by_its_name(tmp_path, kit, old, new, words):  # C37 C152
    """What is changed stands in the kit's config."""
    path = kit_copy(kit, tmp_path / kit) / "config.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    load = {"vad": vad.load_vad, "punc": punctuation.load_punctuation}.get(kit, checkpoint.load_system)
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        load(str(path.parent))
    assert kit != "sanm" or str(caught.value).startswith(f"{path}: ")

PLAIN = {"model": "Paraformer", "encoder": "SANMEncoder", "encoder_conf": {"input_layer": "pe"},
         "predictor": "CifPredictorV2", "decoder": "ParaformerSANMDecoder", "frontend": "WavFrontend",
         "tokenizer": "CharTokenizer"}
CONFORMER = {"input_layer": "conv2d", "macaron_style": True, "activation_type": "swish",
             "pos_enc_layer_type": "rel_pos", "selfattention_layer_type": "rel_selfattn"}
SEACO = {"model": "SeacoParaformer", "model_conf": {}, "seaco_decoder": "ParaformerSANMDecoder",
         "seaco_decoder_conf": {"use_output_layer": False, "wo_input_layer": True}}
LAYERS = dict(hidden_dim=256, num_heads=4, ffn_dim=2048, num_layers=6, dropout=0.1, attention_dropout=0.0,
              memory_shift=0)

@pytest.mark.parametrize("changes, section, wanted", [
    ({}, "model", dict(ctc_weight=0.5, label_smoothing=0.0, quantity_weight=0.0, sampling_ratio=0.2, end_token=False,
                       loss_unit="utterance", share_embedding=False, norm_eps=1e-12)),
    ({}, "model.encoder", LAYERS | dict(kernel_size=11)),
    ({}, "model.decoder", LAYERS | dict(kernel_size=21, attention_layers=6)),
    ({}, "model.predictor", dict(left=1, right=1, smooth=1.0, noise=0.0, dropout=0.1, tail=0.0)),
    ({}, "data", dict(sample_rate=16000, num_mels=80, lfr_m=1, lfr_n=1)),
    ({"encoder": "ConformerEncoder", "encoder_conf": CONFORMER}, "model.encoder", dict(kernel_size=31, subsampling=4)),
    ({"predictor": "CifPredictor"}, "model.predictor", dict(tail=0.45)),
    ({"predictor": "CifPredictorV3", "predictor_conf": {"use_cif1_cnn": False, "upsample_type": "cnn_blstm"}},
     "model.predictor", dict(upsampling=5, timing_smooth=1.0, timing_noise=0.0, tail=0.0)),
    (SEACO, "model.hotwords", dict(no_bias=8377, both_ways=False)),
    ({**SEACO, "model_conf": dict.fromkeys("""bias_encoder_dropout_rate seaco_length_normalized_loss seaco_weight
        crit_attn_weight crit_attn_smooth target_buffer_length use_1st_decoder_loss""".split(), 0)}, "model", {}),
    ({"predictor": "CifPredictorV3", "predictor_conf": {"use_cif1_cnn": False, "upsample_type": "cnn_blstm",
                                                        "upsample_times": 1}, **SEACO},
     "model.predictor", dict(upsampling=1)),
    ({"predictor_conf": {"smooth_factor": 1.25, "noise_threshold": 0.25}}, "model.predictor", dict(smooth=1.25)),
    ({"encoder_conf": {"input_layer": "pe", "sanm_shift": 3}, "decoder_conf": {"sanm_shift": 4}}, "model",
     {"encoder.memory_shift": 3, "decoder.memory_shift": 4}),
    ({"decoder_conf": {"sanm_shfit": None}}, "model.decoder", dict(memory_shift=10))])      # causal, not centred
def test_what_a_published_config_leaves_out_is_funasrs_default(tmp_path, changes, section, wanted):  # C36
    """And FunASR is told it again, with the sizes that ours leaves to a rule."""
    found = funasr.read_published_config(written(tmp_path, config.dump_yaml({**PLAIN, **changes})))
    part = operator.attrgetter(section)(found)
    assert {name: operator.attrgetter(name)(part) for name in wanted} == wanted
    sections = {name: replace(getattr(found.model, name), ffn_dim=0) for name in ("encoder", "decoder")}
    sections["decoder"] = replace(sections["decoder"], attention_layers=0)
    text = funasr.dump_published_config(replace(found, model=replace(found.model, **sections)))
    again = funasr.read_published_config(written(tmp_path, text)).model
    assert (again.encoder.ffn_dim, again.decoder.ffn_dim, again.decoder.attention_layers) == (1024, 1024, 6)
    assert again.predictor == found.model.predictor and "split_with_space: true" in text
    assert funasr_layers.NormedFeedForward(6, 0, 0.0).up.out_features == 24

@pytest.mark.parametrize("options", [3, "x", [1]])
def test_options_of_a_published_config_are_a_section(tmp_path, options):
    path = written(tmp_path, config.dump_yaml({**PLAIN, "encoder_conf": options}))
    refused("wanted FunASR's 'encoder: CLASS' and 'encoder_conf: options'", funasr.read_published_config, path)

@pytest.mark.parametrize("state", [{}, {"model": {}}, {"a": torch.zeros(1), "b": 1}, [torch.zeros(1)]])
def test_weights_of_funasr_are_tensors_by_name(tmp_path, state):
    torch.save(state, tmp_path / "model.pt")
    refused(f"model.pt: wanted tensors by name, got {type(state).__name__}", funasr.read_weights, tmp_path / "model.pt")

def test_a_published_yaml_of_any_shape_is_read(tmp_path):
    """Indents of four, lists at their key's column, lists in lists, {}, and 8405 symbols inside, as PyYAML writes."""
    text = kit("sanm/config.yaml").read_text()
    head = "init: null\nnormalize_conf: {}\nmax_epoch: 50\n"
    head += "best_model_criterion:\n-   - valid\n    - acc\n    - max\nuse: True\nquoted: 'it''s: #'\n"
    head += "token_list:\n- <blank>\n"
    head += "".join(f"- {chr(0x4e00 + i)}\n" for i in range(8402)) + "- '0'\n- <unk>\n"
    deep = "\n".join(re.sub("^( *)", lambda m: 2 * m[1], line) for line in text.splitlines())
    path = written(tmp_path, head + deep + "\n")
    assert funasr.read_published_config(path) == funasr.read_published_config(kit("sanm/config.yaml"))
    values = config.parse_yaml(Path(path).read_text(encoding="utf-8"))
    assert values["best_model_criterion"] == [["valid", "acc", "max"]] and len(values["token_list"]) == 8405

def test_configuration_json_names_the_files(tmp_path):  # C38
    metas = {"init_param": "a.pb", "tokenizer_conf": {"token_list": "t.json"}, "frontend_conf": {"cmvn_file": "c.mvn"}}
    (tmp_path / "configuration.json").write_text(json.dumps({"file_path_metas": metas}))
    files = funasr.published_files(tmp_path)
    assert {part: path.name for part, path in files.items()} == {
        "config": "config.yaml", "model": "a.pb", "tokens": "t.json", "stats": "c.mvn"}
    (tmp_path / "configuration.json").write_text('{"file_path_metas": {"tokenizer_conf": {"seg_dict_file": null}}}')
    refused("wanted JSON with file_path_metas, got tokenizer_conf.seg_dict_file None", funasr.published_files, tmp_path)
    (tmp_path / "configuration.json").unlink()
    (tmp_path / "tokens.txt").touch()
    assert funasr.published_files(tmp_path)["tokens"].name == "tokens.txt"
    (tmp_path / "tokens.json").touch()
    assert funasr.published_files(tmp_path)["tokens"].name == "tokens.json"

def test_a_directory_is_funasrs_unless_it_holds_a_checkpoint_of_ours(tmp_path):
    assert funasr.is_published(tmp_path) and not funasr.is_published("") and not funasr.is_published(tmp_path / "none")
    (tmp_path / "checkpoint.pt").touch()
    assert not funasr.is_published(tmp_path)

# ---- funasr: vocabularies, sentences, am.mvn ----

def unit_cases(name):
    return json.loads(kit("units/text.json").read_text(encoding="utf-8"))[name]

def funasr_keeps(symbols: list[str]) -> bool:
    """Whether FunASR's text has all that was said: no mark, and no word that breaks off before its last piece."""
    pairs = zip(symbols, [*symbols[1:], ""])
    return "%" not in symbols and all("@@" not in a or re.match("[a-z']", b) for a, b in pairs)

def test_sentences_keep_every_character_and_equal_funasrs_where_it_loses_none():  # C44
    """Recorded: funasr_kit/units/text.json, 160 token lists, with and without times."""
    equal = 0
    for case in unit_cases("text"):
        symbols, times, words = case["tokens"], case["ts_in"], spell_words(case["tokens"])
        spoken = [symbol for symbol in symbols if symbol not in UNSPOKEN]
        whole = "".join(spoken).replace("@@", "").lower()
        assert write_sentence(words).replace(" ", "").lower() == whole
        if funasr_keeps(spoken):
            equal += 1
            assert write_sentence(words) == case["text"], symbols
            assert " ".join(word.text for word in words) == case["text_ts"]
            timed = [word for word in words if word.kind != "other"]  # D4: to a mark FunASR gives no time
            assert [[times[word.start][0], times[word.end - 1][1]] for word in timed] == case["ts_out"]
    assert equal > 80

def test_a_list_of_symbols_ends_its_lines_with_newlines_only(tmp_path):
    """U+0085, U+2028 and a form feed are symbols like others: no id behind them may shift."""
    symbols = ["<blank>", "<s>", "</s>", "a\x85", "\u2028", "\x0c", "<unk>"]
    (tmp_path / "tokens.txt").write_text("\n".join(symbols) + "\n", "utf-8")
    assert PieceTokenizer.load(tmp_path / "tokens.txt").symbols == tuple(symbols)
    assert PieceTokenizer.from_state({"symbols": [*"abcd"]}).encode("bx") == [1, 3]  # without <unk>, the last one is it

def test_symbols_are_of_the_kinds_that_funasr_tells_apart():
    assert [c for c in "\u4dff\u4e00\u9fff\ua000/09:@A" if _is_han(c)] == ["\u4e00", "\u9fff", "0", "9", "@"]
    assert [_kind(symbol) for symbol in ("你3", "th@@", "it's", "a%", "你a", "%")] == [
        "han", "piece", "word", "other", "word", "other"]

@pytest.mark.parametrize("name, content, error", [
    ("tokens.json", b"[1, 2", r"tokens.json: wanted a list of symbols, got no JSON \(.*"),
    ("tokens.json", b"\xff", "tokens.json: wanted a list of symbols, got 'utf-8' codec.*"),
    ("tokens.json", b'["<blank>", "<s>", "</s>"]', "tokens.json: wanted a list of four symbols or more, got .*"),
    ("tokens.json", b'["<blank>", "<s>", "</s>", 4]', "tokens.json: wanted a list of four symbols or more, got .*"),
    ("seg_dict", b"\xff", "seg_dict: wanted a dictionary, got 'utf-8' codec.*"),
    ("seg_dict", None, "seg_dict: wanted a dictionary, got No such file or directory$")])
def test_a_broken_file_of_a_published_vocabulary_is_named(tmp_path, name, content, error):
    (tmp_path / "tokens.json").write_text(json.dumps(["<blank>", "<s>", "</s>", "ab@@", "\u2028", "<unk>"]))
    (tmp_path / "seg_dict").write_text("ab\u2028 ab@@\nc ab@@ <unk>\n", "utf-8")
    files = tmp_path / "tokens.json", tmp_path / "seg_dict"
    whole = PieceTokenizer.load(*files)
    assert whole.encode("c") == [3, 5] and set(whole.pieces) == {"ab", "c"}
    for pieces in (whole.pieces, whole.state()["pieces"]):  # of an older checkpoint, and as they are written
        assert checkpoint.read_tokenizer({**whole.state(), "pieces": pieces}, "x.pt") == whole
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_bytes(content)
    refused(re.escape(str(tmp_path)) + "/" + error, PieceTokenizer.load, *files)
    with pytest.raises(ValueError, match=r"x.pt: wanted a list of pieces by word, got \[\['ab'\]\]"):
        checkpoint.read_tokenizer({**whole.state(), "pieces": [["ab"]]}, "x.pt")
    with pytest.raises(ValueError, match="x.pt: wanted a list of pieces by word, got {'ab': 3, 'c': "):
        checkpoint.read_tokenizer({**whole.state(), "pieces": {"ab": 3, "c": ["c"]}}, "x.pt")

@pytest.mark.parametrize("variant", VARIANTS)
def test_texts_are_cut_into_funasrs_symbols(variant):  # C42
    """A second space, a tab, U+3000, a no-break space and a byte order mark are none; what is unknown is named."""
    folder = kit(variant)
    dictionary = folder / "seg_dict"
    ours = PieceTokenizer.load(folder / "tokens.json", dictionary if dictionary.exists() else None)
    for case in kit_results(folder.name)["_tokenizer"]:
        assert ours.encode(case["text"]) == case["ids"]
        assert ours.decode([1, *case["ids"], 2, 0]) == ours.decode(case["ids"])
    assert checkpoint.read_tokenizer(json.loads(json.dumps(ours.state())), "x") == ours
    wanted = ours.encode("我 在 一 我")
    assert ours.unknown not in wanted
    for text in ("我  在\t一\u3000我", "\ufeff我\u00a0在 \u200b 一 我\u00ad ", "\n我\u2003在\u2028一 \x85我"):
        assert ours.encode(text) == wanted and ours.unknown_units(text) == []
    assert ours.unknown_units("我 ☃ 在☃") == ["☃", "☃"]
    assert ours.encode_hotword("我\u200b 在") == ours.encode_hotword("我 在")

def test_unknown_symbols_are_told_by_share_and_name_and_refused_above_a_half(tmp_path):
    """Of a model that gives the vocabulary: 9 of 23 symbols; a half is trained on, more is an error."""
    known = Tokenizer.build(["ab cd"])
    path = write_manifest(tmp_path / "m.jsonl", [{"audio": "a.wav", "text": "ab cd abxxxxyy"},
                                                 {"audio": "b.wav", "text": " a\u3000bxyz "},
                                                 {"audio": "c.wav", "text": "ab"}])
    options = SimpleNamespace(data=data_options(kind="manifest", train=str(path), dev=str(path)),
                              training=SimpleNamespace(init_from="x.pt"))
    lines = [list(dry_run.symbol_warnings(options, known, split)) for split in ("train", "dev")]
    assert [len(found) for found in lines] == [1, 1]
    assert lines[0][0] == ("data.train: wanted symbols that the vocabulary has, got 9 unknown ones of 22 (40.9%), the "
                           "most frequent 'x' (5) 'y' (3) 'z' (1), in 2 texts; the vocabulary is that of "
                           "training.init_from=x.pt")
    checkpoint.check_vocabulary(["abxx"], known, "x.pt")
    with pytest.raises(ValueError, match=re.escape("training.init_from=x.pt: wanted a vocabulary for the training "
                                                   "texts, got one without 3 of their 5 symbols, the most "
                                                   "frequent 'y' 'x'")):
        checkpoint.check_vocabulary(["abxyy"], known, "x.pt")
    options.training.init_from = ""
    assert "try --data.train=" in list(dry_run.symbol_warnings(options, known, "dev"))[0]

def test_am_mvn_is_read_as_written_to_the_last_bit(tmp_path):  # C41
    stats = torch.randn(2, 560) * 10
    funasr.write_cmvn(tmp_path / "am.mvn", stats)
    assert torch.equal(funasr.read_cmvn(tmp_path / "am.mvn", 560), stats)
    with pytest.raises(ValueError, match=r"am\.mvn: wanted 80 numbers each, as the features have, got 560 and 560"):
        funasr.read_cmvn(tmp_path / "am.mvn", 80)
    refused("gone: wanted means and deviations, .*, got No such file", funasr.read_cmvn, tmp_path / "gone", 80)
    for shape in ((560,), (2,), (3, 560)):
        with pytest.raises(ValueError, match=r"stats must be \(2,F\), got " + re.escape(str(shape))):
            funasr.write_cmvn(tmp_path / "b.mvn", torch.zeros(shape))

# ---- baselines: models ----

def rival(name, seed=0, **options):
    """A transformer or CTC model of width 8 for 5 feature bins and 7 tokens; half of them end a text or are blank."""
    section = config.ModelConfig(
        name=name, encoder=config.EncoderConfig("conformer", num_layers=1, hidden_dim=8, num_heads=2, kernel_size=3,
                                                dropout=0.0, subsampling=2), **options,
        decoder=config.DecoderConfig(num_layers=2, hidden_dim=12, num_heads=2, dropout=0.0))
    torch.manual_seed(seed)
    built = checkpoint.build(section, 5, 7).double().eval()
    for p in built.parameters():
        p.data += 0.3 * torch.randn(p.shape)
    return built

def test_step_by_step_decoding_equals_the_full_pass():  # C61
    transformer, (feats, feat_lens, _, _) = rival("transformer"), ragged(1)
    hidden, lens = transformer.encode(feats, feat_lens)
    said = torch.randint(3, 7, (4, 3, 6), generator=torch.Generator().manual_seed(0))  # 3 hypotheses each
    step, past = transformer.begin(hidden, lens, 3)
    rows = [F.pad(said, (1, 0), value=SOS)[:, :, u] for u in range(7)]
    steps, looks = [], []
    for tokens in rows:
        log_p, past, attention = step(tokens, past)
        steps.append(log_p)
        looks.append(attention)
    for w in range(3):
        logits, layers = transformer.decoder(torch.stack(rows, 2)[:, w], hidden, lens, need_weights=True)
        assert_same(torch.stack(steps, 2)[:, w], logits.log_softmax(-1), 1e-12)
        assert_same(torch.stack(looks, 2)[:, w], layers[-1].mean(1), 1e-12)

def test_greedy_of_the_transformer_equals_a_loop_without_cache_and_is_bounded_by_the_frames():  # C61
    transformer, (feats, feat_lens, _, _) = rival("transformer", seed=31), ragged(2)
    found = transformer.greedy(feats, feat_lens)
    looks = transformer.cross_attention(*transformer.encode(feats, feat_lens), found.tokens, found.lens)[-1].mean(1)
    ends = set()
    for i, T in enumerate(feat_lens.tolist()):
        hidden, lens = transformer.encode(feats[i:i + 1, :T], feat_lens[i:i + 1])
        tokens, log_probs = [SOS], []
        while len(tokens) <= int(lens):
            log_p = transformer.decoder(torch.tensor([tokens]), hidden, lens)[0][0, -1].log_softmax(-1)
            if log_p.argmax() == EOS:
                break
            tokens.append(int(log_p.argmax()))
            log_probs.append(log_p.max().item())
        ends.add(len(tokens) <= int(lens))
        assert found.tokens[i, :found.lens[i]].tolist() == tokens[1:]
        assert found.log_probs[i, :found.lens[i]].tolist() == pytest.approx(log_probs, abs=1e-5)
        edges = found.boundaries[i]
        assert len(edges) == len(tokens) and (edges.diff() >= 0).all() and 0 <= edges[0] and edges[-1] <= T
        look = looks[i, :found.lens[i], :int(lens)]
        middles = 2 * (look.argmax(1) + 0.5).cummax(0).values - 0.5  # encoder frame t ends with feature frame 2 t + 1.5
        assert_same(edges[1:-1], (middles[1:] + middles[:-1]).double() / 2, 1e-9)
        assert_same(found.alpha[i, :int(lens)].double(), look.sum(0), 1e-5)
    assert ends == {True, False}
    assert_same(found.alpha.sum(1).double(), found.lens.double(), 1e-5)

def test_ctc_tokens_stand_on_the_best_path_and_a_given_text_on_its_own_best_path():  # C62
    ctc, (feats, feat_lens, _, _) = rival("ctc", seed=1), ragged(3)
    found = ctc.greedy(feats, feat_lens)
    hidden, hidden_lens = ctc.encode(feats, feat_lens)
    looks, = ctc.cross_attention(hidden, hidden_lens, found.tokens, found.lens)
    log_p = ctc.log_probs(hidden).detach()
    for i, L in enumerate(((feat_lens + 1) // 2).tolist()):
        path = log_p[i, :L].argmax(-1).tolist()
        runs = [[(t, s) for t, s in run] for _, run in itertools.groupby(enumerate(path), lambda x: x[1])]
        peaks = [max(run, key=lambda x: float(log_p[i, x[0], x[1]])) for run in runs if run[0][1] != BLANK]
        assert found.tokens[i, :found.lens[i]].tolist() == [s for _, s in peaks]
        wanted = [float(log_p[i, t, s]) for t, s in peaks]
        assert found.log_probs[i, :found.lens[i]].tolist() == pytest.approx(wanted, abs=1e-6)
        assert_same(found.alpha[i, :L], 1 - log_p[i, :L, BLANK].exp(), 1e-6)
        middles = [2 * t + 0.5 for t, _ in peaks]  # encoder frame t stands on feature frames 2 t and 2 t + 1, less 1/2
        inner = [(a + b) / 2 for a, b in zip(middles, middles[1:])]
        assert found.boundaries[i].tolist()[1:-1] == pytest.approx(inner)
        if len(middles) > 1:  # the first and the last are as long behind their middle as before it, in the utterance
            first, last = max(2 * middles[0] - inner[0], 0.0), 2 * middles[-1] - inner[-1]
            last = min(last, 2 * L - 0.5, int(feat_lens[i]))
            assert found.boundaries[i][[0, -1]].tolist() == pytest.approx([first, last])
        assert_same(looks[i, 0, :len(peaks), :L], log_p[i, :L].exp()[:, [s for _, s in peaks]].T, 1e-6)
    assert int(found.lens.max()) > 2
    twice = torch.tensor([[0.0, 4, 0, 0], [3, 0, 0, 0], [3, 0, 0, 0], [0, 3, 0, 0]])  # the best path says 1 two times
    log_p = normal(4, 12, 5, 4).log_softmax(-1)
    for rows, text in ((log_p[0], [1, 1]), (log_p[1, :3], [2, 3]), (log_p[2, :1], [3]), (log_p[3], []), (twice, [1]),
                       *zip(log_p[4:, :4], [[1], [2], [3], [1, 2], [2, 2], [3, 1], [1, 2, 1], [2, 3]])):
        table = rows.tolist()
        spells = [p for p in itertools.product(range(4), repeat=len(rows))
                  if [s for s, _ in itertools.groupby(p) if s] == text]
        best = max(spells, key=lambda p: sum(table[t][s] for t, s in enumerate(p)))
        assert baselines.ctc_path(rows, text) == list(best)

@pytest.mark.parametrize("name", ["transformer", "ctc"])
def test_losses_and_results_of_the_compared_models_do_not_depend_on_the_batch(name):  # C63
    built, batch = rival(name, seed=5), ragged(6)
    sums, count = built(*batch)
    alone = [built(*one(batch, i)) for i in range(4)]
    for part in sums:
        assert_same(sums[part], sum(single[part] for single, _ in alone), 1e-6)
    assert int(count) == sum(int(n) for _, n in alone) == 10 + 4 * (name == "transformer")
    if name == "transformer":
        assert_same(sums["loss"], 0.7 * sums["ce"] + 0.3 * sums["ctc"], 1e-9)
    found = built.greedy(*batch[:2])
    for i, (feats, feat_lens, _, _) in enumerate(one(batch, i) for i in range(4)):
        single = built.greedy(feats, feat_lens)
        assert found.tokens[i, :found.lens[i]].tolist() == single.tokens[0].tolist()
        assert_same(found.boundaries[i], single.boundaries[0], 1e-9)
    assert built.greedy(*(x[:0] for x in batch[:2])).tokens.shape[0] == 0

def test_the_transformer_is_taught_each_token_after_the_true_ones_and_then_the_end():  # C63
    transformer, (feats, feat_lens, tokens, token_lens) = rival("transformer", label_smoothing=0.0), ragged(7)
    hidden, lens = transformer.encode(feats, feat_lens)
    wanted = 0.0
    for i, n in enumerate(token_lens.tolist()):
        text = [*tokens[i, :n].tolist(), EOS]
        for u, token in enumerate(text):
            before = torch.tensor([[SOS, *text[:u]]])
            logits, _ = transformer.decoder(before, hidden[i:i + 1], lens[i:i + 1])
            wanted -= logits[0, -1].log_softmax(-1)[token].item()
    assert transformer(feats, feat_lens, tokens, token_lens)[0]["ce"].item() == pytest.approx(wanted, rel=1e-6)

# ---- baselines: search ----

def table_model(B, V, L, seed):
    """A step function whose log probabilities and attention are drawn by prefix, and the same of one (b, ids) alone."""
    def told(b, prefix):
        rng = torch.Generator().manual_seed(seed + 31 * b + sum((i + 1) * 7 ** k for k, i in enumerate(prefix)))
        return (torch.randn(V, generator=rng).log_softmax(-1), torch.rand(L, generator=rng))

    def step(tokens, past):
        past = [torch.cat((past[0], tokens[:, :, None]), 2)]
        rows = [[told(b, prefix) for prefix in row] for b, row in enumerate(past[0].tolist())]
        return (torch.stack([torch.stack([log_p for log_p, _ in row]) for row in rows]), past,
                torch.stack([torch.stack([look for _, look in row]) for row in rows]))

    return step, told

def every_text(told, b, frames, V, search):
    """{text: (log probability, score)} of all texts of at most `frames` tokens, by the formulas of GNMT."""
    found = {}
    for n in range(frames + 1):
        for text in itertools.product([i for i in range(V) if i != EOS], repeat=n):
            parts = [told(b, (SOS, *text[:u])) for u in range(n + 1)]
            log_prob = sum(float(log_p[i]) for (log_p, _), i in zip(parts, (*text, EOS)))
            covered = sum(look for _, look in parts)[:frames].clamp(baselines.UNSEEN, 1)
            found[text] = log_prob, (log_prob / ((5 + n + 1) / 6) ** search.length_penalty
                                     + search.coverage_penalty * float(covered.log().sum()))
    return found

@pytest.mark.parametrize("penalties", [(0.0, 0.0), (0.6, 0.0), (1.0, 0.3)])
def test_a_beam_that_holds_everything_equals_exhaustive_search(penalties):  # C64
    frames, V = ints(3, 1, 2, 0), 4
    for seed in range(3):
        step, told = table_model(4, V, 3, 1000 * seed)
        search = baselines.Search(60, 3, *penalties)
        found = baselines.beam_search(step, [torch.zeros(4, 60, 0, dtype=torch.long)], frames, search)
        for b, L in enumerate(frames.tolist()):
            wanted = every_text(told, b, L, V, search)
            best = sorted(wanted, key=lambda text: -wanted[text][1])[:3]
            assert [tuple(one.tokens) for one in found[b][:3]] == best
            assert [one.score for one in found[b][:3]] == pytest.approx([wanted[t][1] for t in best], abs=1e-5)
            assert [one.log_prob for one in found[b][:3]] == pytest.approx([wanted[t][0] for t in best], abs=1e-5)

def test_a_beam_is_settled_once_no_open_text_could_pass_the_best_that_ended():  # C64
    """The open one has log probability -2 and may become 3 tokens and the end: then it scores -2 / ((5 + 4) / 6)."""
    assert baselines.UNSEEN == 0.01
    for score, settled in ((-1.4, False), (-2 / (9 / 6), True), (-1.3, True)):
        scores, lens = torch.tensor([[score, -9.0]]), ints(2, 2)[None]
        beam = baselines.Beam(lens, lens, torch.tensor([[True, False]]), torch.full((1, 2), -2.0), scores, scores)
        assert baselines.is_settled(beam, ints(3), baselines.Search(2, 1, 1.0)) == settled, score

def test_a_narrow_beam_keeps_what_has_ended_and_never_scores_a_text_wrong():  # C64
    frames, V, search = ints(4, 4), 4, baselines.Search(3, 3, 0.6, 0.2)
    for seed in range(5):
        step, told = table_model(2, V, 4, 1000 * seed)
        found = baselines.beam_search(step, [torch.zeros(2, 3, 0, dtype=torch.long)], frames, search)
        for b in range(2):
            wanted = every_text(told, b, 4, V, search)
            scores = [one.score for one in found[b]]
            assert scores == pytest.approx([wanted[tuple(one.tokens)][1] for one in found[b]], abs=1e-5)
            assert 1 <= len(scores) <= 3 and scores == sorted(scores, reverse=True)

def test_with_alternatives_every_hypothesis_is_the_same_whatever_utterance_takes_longer():  # C67
    for seed in range(10):  # of the best ones some may have one text: the rest of the beam is asked for too
        (step, _), search = table_model(2, 4, 6, 1000 * seed), baselines.Search(4, 2, 0.6)
        past = torch.zeros(2, 4, 0, dtype=torch.long)
        alone, both = (baselines.beam_search(step, [past[:B]], ints(3, 6)[:B], search) for B in (1, 2))
        assert [one.tokens for one in alone[0]] == [one.tokens for one in both[0]]
        assert [one.score for one in alone[0]] == pytest.approx([one.score for one in both[0]], abs=1e-5)

def test_prefix_search_equals_the_sum_over_all_paths():  # C65
    for seed, L in ((0, 5), (1, 3), (2, 1), (3, 0)):
        log_p = (2 * normal(seed, L, 3)).log_softmax(-1)
        wanted = collections.defaultdict(float)
        for path in itertools.product(range(3), repeat=L):
            text = tuple(s for s, _ in itertools.groupby(path) if s)
            wanted[text] += math.exp(sum(float(log_p[t, s]) for t, s in enumerate(path)))
        found = baselines.prefix_search(log_p, 80)
        texts = [tuple(one.tokens) for one in found]
        assert texts == sorted(wanted, key=lambda text: -wanted[text])
        assert [math.exp(one.score) for one in found] == pytest.approx([wanted[t] for t in texts], rel=1e-9)
        narrow = baselines.prefix_search(log_p, 3)
        assert len(narrow) == min(3, len(texts)) and narrow[0].tokens == list(texts[0])
        assert all(math.exp(one.score) <= wanted[tuple(one.tokens)] * (1 + 1e-9) for one in narrow)

def test_prefix_search_looks_at_no_token_that_could_not_be_among_the_best():  # C65
    """Of 40 tokens and a beam of 2, against all tokens at every frame."""
    for seed in range(20):
        log_p, beam = (2 * normal(seed, 6, 40)).log_softmax(-1), {(): baselines.Prefix(blank=0.0)}
        for frame in log_p.tolist():
            grown = baselines.extend_prefixes(beam, frame, set(range(1, 40)))
            beam = {text: grown[text] for text in sorted(grown, key=lambda text: -grown[text].total)[:2]}
        assert [tuple(one.tokens) for one in baselines.prefix_search(log_p, 2)] == list(beam)

def searching_system(name: str, kind: str = "manifest", **options) -> checkpoint.System:
    system = tiny_system(kind, name, **options)
    for p in system.model.parameters():
        p.data += 0.2 * torch.randn(p.shape)
    return system

@pytest.mark.parametrize("name, search", [("transformer", baselines.Search(4, 3, 0.6, 0.1)),
                                          ("ctc", baselines.Search(6, 3))])
def test_alternatives_differ_and_are_ranked_and_do_not_depend_on_the_batch(name, search):  # C67
    system, feats = decode.with_search(searching_system(name), search), ragged_feats([31, 0, 7, 1, 22])
    together = decode.transcribe(system, feats)
    for x, result in zip(feats, together):
        alone = decode.transcribe(system, [x])[0]
        assert (alone.text, [a.text for a in alone.nbest]) == (result.text, [a.text for a in result.nbest])
        for a, b in zip(alone.nbest, result.nbest):
            assert (a.score, a.confidence) == pytest.approx((b.score, b.confidence), abs=2e-3)
        scores, texts = [a.score for a in result.nbest], [a.text for a in result.nbest]
        assert scores == sorted(scores, reverse=True) and len(set(texts)) == len(texts) <= 3
        assert not len(x) or texts[0] == result.text == "".join(token.token for token in result.tokens)
    assert len(together[0].nbest) == len(together[4].nbest) == 3 and together[1].nbest == ()

@pytest.mark.parametrize("upsampling, texts", [(0, ["你好", "你"]), (3, ["你 好", "你"])])  # a timing head: apart
def test_alternatives_are_spelled_as_results_are(upsampling, texts):
    system = tiny_system()._replace(search=baselines.Search(nbest=3))
    predictor = replace(system.config.model.predictor, upsampling=upsampling)
    system = system._replace(tokenizer=PieceTokenizer((*SPECIALS, "你", "好"), None), config=replace(
        system.config, model=replace(system.config.model, predictor=predictor)))
    found = Hypotheses(ints(4, 5)[None], ints(2), torch.zeros(1, 2), [torch.arange(3.0)], torch.zeros(1, 4), [])
    candidates = [baselines.Candidate([4, 5], -1.0, -0.512345), baselines.Candidate([4, EOS], -1.4, -0.7),
                  baselines.Candidate([], 0.0, -0.8), baselines.Candidate([5], -0.9, -0.9)]
    assert decode.read_result(system, found, 0).text == texts[0]
    for count, wanted in ((1, 0), (2, 2), (3, 3), (4, 4)):
        nbest = decode.read_result(system._replace(search=baselines.Search(nbest=count)), found, 0, candidates).nbest
        assert nbest == ((texts[0], -0.5123, 0.6065), (texts[1], -0.7, 0.4966), ("", -0.8, 0.0),
                         ("好", -0.9, 0.4066))[:wanted]

def test_a_beam_of_one_is_greedy():  # C67
    system, feats = searching_system("transformer"), ragged_feats([31, 7, 1, 50, 22])
    greedy = decode.transcribe(system, feats)
    assert decode.transcribe(decode.with_search(system, baselines.Search(1, 1, 0.0)), feats) == greedy
    assert any(result.text for result in greedy)

@pytest.mark.parametrize("name, flags, words", [
    ("ctc", ["--beam=0"], "--beam: wanted 1 or more, below 2^31, got 0"),
    ("ctc", ["--beam=99999999999999999999"], "--beam: wanted 1 or more, below 2^31, got 99999999999999999999"),
    ("ctc", ["--nbest=2147483648"], "--nbest: wanted 1 or more, below 2^31, got 2147483648"),
    ("transformer", ["--nbest=-1"], "--nbest: wanted 1 or more, below 2^31, got -1"),
    ("ctc", ["--length-penalty=1"], "--length-penalty: wanted 0.6, as it has no effect on a ctc, got 1.0"),
    ("paraformer", ["--beam=2"], "a paraformer model decodes greedily: leave out --beam, --nbest and penalties\n"),
    ("paraformer", ["--nbest=3"], "decodes greedily"), ("paraformer", ["--coverage-penalty=1"], "decodes greedily"),
    ("transformer", ["--length-penalty=inf"], "--length-penalty: wanted 0 or more, got inf"),
    ("transformer", ["--coverage-penalty=nan"], "--coverage-penalty: wanted 0 or more, got nan")])
def test_search_flags_out_of_range_or_without_effect_are_refused(tmp_path, capsys, name, flags, words):  # C68
    ckpt = saved(searching_system(name), tmp_path / "x.pt")
    assert words in refusal(capsys, "--ckpt", ckpt, *flags, "x.wav")
    assert words in refusal(capsys, "--ckpt", ckpt, *flags, "x.wav", "--export", tmp_path / "out.pt")  # before writing
    assert os.listdir(tmp_path) == ["x.pt"]

# ---- hotwords: the two models ----

HOTWORD_KITS = ("seaco", "seaco_alt", "contextual", "contextual_alt")

def results_by_recording(variant: str) -> dict[str, dict]:
    """{recording: its case, with that of each list in "hot"}"""
    return {name: case for name, case in kit_results(variant).items() if not name.startswith("_")}

def hotword_phrases(variant: str, case: str) -> list[str] | None:
    """The phrases of a list of the results; of "several_x2.5" those of "several"."""
    if case == "file":
        return kit(variant, "hotwords.txt").read_text(encoding="utf-8").splitlines()
    words = kit_results(variant)["_hotwords"][case.partition("_x")[0]]
    return None if words is None else words.split()

def outputs_of(module: nn.Module, monkeypatch) -> list[torch.Tensor]:
    """Where the (first) output of each call of the module will be."""
    seen, forward = [], module.forward

    def recording(*args, **kwargs):
        out = forward(*args, **kwargs)
        seen.append(out[0] if isinstance(out, tuple) else out)
        return out
    monkeypatch.setattr(module, "forward", recording)
    return seen

def test_a_list_is_shortened_from_51_entries_on_and_64_lists_are_remembered():
    """Of 50 and 52 entries the longer one leaves 50 and "none of them"; a phrase with what is unknown is told."""
    choose = hotwords.SeacoParaformer.choose
    entries = torch.arange(104.0).view(2, 52, 1)
    assert choose(None, None, None, entries[:, :50], torch.tensor([50, 50]))[0].shape == (2, 50, 1)
    model = SimpleNamespace(scores=lambda *given: entries[:, :, 0])       # the last ones are the best
    chosen, lens = choose(model, None, None, entries, torch.tensor([50, 52]))
    assert lens.tolist() == [50, 51] and chosen.shape == (2, 51, 1)
    assert chosen[0, :50, 0].tolist() == list(range(50))
    assert chosen[1, :, 0].tolist() == [*range(103, 53, -1), 103]
    assert hotwords.list_encoder(None, len).cache_info().maxsize == 64
    tokenizer = SimpleNamespace(unknown=0, encode_hotword=lambda phrase: [1, 0] if "?" in phrase else [1])
    assert hotwords.unknown_warning(["a", "b"], tokenizer) == ""
    assert "so these hotwords help little: b?, ? (" in hotwords.unknown_warning(["a", "b?", "?"], tokenizer)

@pytest.mark.parametrize("variant", HOTWORD_KITS)
@torch.no_grad()
def test_every_list_of_hotwords_gives_funasrs_ids_and_values(variant, monkeypatch):  # C43 C150
    """Recorded values and tolerances: funasr_kit/<variant>/expected and its README; features are our own."""
    system = kit_system(variant)
    net, changed = system.model, 0
    if isinstance(net, hotwords.SeacoParaformer):
        stages = {"dec_hidden": outputs_of(net.decoder.norm, monkeypatch),
                  "attended": outputs_of(net.hotword_decoder.norm, monkeypatch),
                  "dha_logits": outputs_of(net.hotword_decoder.output, monkeypatch)}
        tolerance = {"dec_hidden": 3e-3, "cif_attended": 3e-3, "dec_attended": 3e-3, "dha_logits": 1e-2}
    else:
        block = net.hotword_block
        stages = {"x_src": outputs_of(block.cross_attention, monkeypatch),
                  "cx": outputs_of(block.hotword_attention, monkeypatch)}
        tolerance = {"x_src": 3e-3, "cx": 3e-3}
    for name, result in results_by_recording(variant).items():
        wanted = recorded(variant, name)
        samples, rate_hz = audio.load_wav(kit(f"wavs/{name}.wav"))
        feats = audio.frontend(samples, rate_hz, system.config.data, system.stats)
        for case, expected in result["hot"].items():
            phrases, lists = hotword_phrases(variant, case), [None]
            if phrases is not None:
                ids = [system.tokenizer.encode_hotword(phrase) for phrase in phrases]
                assert [*ids, [SOS]] == expected["hotword_ids"]
                lists = [net.encode_hotwords(ids)]
                close(lists[0], wanted[f"hot_{case}_hw_embed"], 1e-5)
            for seen in stages.values():
                seen.clear()
            scale = float(case.partition("_x")[2] or 1)
            found = net.with_hotwords(lists, scale).greedy(feats[None], torch.tensor([len(feats)]))
            assert found.tokens[0].tolist() == expected["ids_raw"], (name, case)
            changed += expected["changed"] > 0
            got = {stage: seen[0][0] for stage, seen in stages.items() if seen}
            if "attended" in got:
                got["cif_attended"], got["dec_attended"] = (x[0] for x in stages["attended"])
            for stage, atol in tolerance.items():
                if f"hot_{case}_{stage}" in wanted:
                    close(got[stage], wanted[f"hot_{case}_{stage}"], atol)
            recorded_scores = wanted[f"hot_{case}_logp" if "seaco" in variant else f"hot_{case}_logits"]
            close(found.log_probs[0], recorded_scores.log_softmax(-1).amax(-1), 1e-2)
            if "no_bias_rows" in expected:
                assert (~found.hotword[0]).int().tolist() == expected["no_bias_rows"]
            if f"hot_{case}_asf_scores" in wanted:
                counts, entries = found.lens, lists[0][None]
                scores = net.scores(stages["dec_hidden"][0], counts, entries, torch.tensor([entries.shape[1]]))
                close(scores[0], wanted[f"hot_{case}_asf_scores"], 3e-3)
    assert changed > 10

@pytest.mark.parametrize("variant", HOTWORD_KITS)
@torch.no_grad()
def test_a_batch_of_lists_equals_its_utterances_one_by_one(variant):  # C45 C151
    """Random cuts, each with a list of its own or none; lists above 50 are filtered for each utterance by itself."""
    system, rng = kit_system(variant), random.Random(0)
    net, lists = system.model, [None]
    for case in ("empty", "one", "several", "many"):
        lists.append(net.encode_hotwords([system.tokenizer.encode_hotword(x) for x in hotword_phrases(variant, case)]))
    lists.append(torch.cat([lists[4][:-1], lists[3]]))
    sources = [recorded(variant, name)["enc"] for name in results_by_recording(variant)]
    replaced = 0
    for _ in range(8):
        parts = [x[:rng.randint(1, len(x))] for x in rng.choices(sources, k=6)]
        chosen, lens = rng.sample(lists, k=6), torch.tensor([len(x) for x in parts])
        hidden = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
        both = net.with_hotwords(chosen).decode(hidden, lens, lens)
        plain = net.decode(hidden, lens, lens)
        for i, x in enumerate(parts):
            alone = net.with_hotwords(chosen[i:i + 1]).decode(x[None], lens[i:i + 1], lens[i:i + 1])
            n = int(alone.lens[0])
            assert both.lens[i] == n and torch.equal(both.tokens[i, :n], alone.tokens[0])
            close(both.log_probs[i, :n], alone.log_probs[0], 1e-4)
            if both.hotword:
                assert torch.equal(both.hotword[i], alone.hotword[0])
            if chosen[i] is None:
                assert torch.equal(both.tokens[i], plain.tokens[i])
            replaced += int((both.tokens[i] != plain.tokens[i]).sum())
    assert replaced > 10
    with pytest.raises(ValueError, match="with_hotwords: wanted a list or None for each of 6 utterances, got 1"):
        net.with_hotwords(lists[1:2]).decode(hidden, lens, lens)

@pytest.mark.parametrize("variant", HOTWORD_KITS)
def test_training_moves_all_but_the_hotword_part(variant):  # C153
    """SeACo's losses and gradients are those of the same model without its hotword part, to the bit."""
    system = checkpoint.load_system(kit(variant), "cpu")
    net = system.model
    frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
    tables = {"embedding.weight"} if isinstance(net, hotwords.SeacoParaformer) or net.shared else set()
    assert tables <= frozen and all(re.search("hotword|merge", name) for name in frozen - tables)
    feats = [recorded(variant, name)["enc"].repeat(1, 20)[:, :560] for name in results_by_recording(variant)][:2]
    lens = torch.tensor([len(x) for x in feats])
    batch = (torch.nn.utils.rnn.pad_sequence(feats, batch_first=True), lens, ints(4, 5, 6, 7, 8, 9).view(2, 3),
             ints(3, 2), torch.rand(2, 4))
    sums, count = net(*batch)
    (sums["loss"] / count).backward()
    trained = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    assert set(trained) == {name for name, p in net.named_parameters() if p.requires_grad}
    assert all(g.abs().max() > 0 for name, g in trained.items() if name != "embedding.weight")
    if isinstance(net, hotwords.SeacoParaformer):
        section = replace(system.config.model, name="paraformer", hotwords=config.HotwordConfig())
        plain = checkpoint.build(section, 560, 58).eval()
        plain.load_state_dict({name: net.state_dict()[name] for name in plain.state_dict()})
        alike, _ = plain(*batch)
        (alike["loss"] / count).backward()
        assert torch.equal(alike["loss"], sums["loss"])
        assert all(torch.equal(plain.get_parameter(name).grad, g) for name, g in trained.items())

def test_a_model_with_hotwords_is_not_trained_from_random_weights(tmp_path, capsys):
    trained(tmp_path, "--model.name=contextual", "--model.encoder.kind=sanm", "--model.decoder.kind=sanm",
            "--model.encoder.subsampling=1", code=2)
    assert "model.name: a contextual starts from a published one, as training does not" in capsys.readouterr().err

@pytest.mark.parametrize("variant", ["seaco", "contextual_alt"])
def test_fine_tuning_gives_the_hotword_part_back_bit_for_bit(variant, tmp_path):  # C153
    run = fine_tuned(tmp_path, variant, ["我 在 人"] * 4, "--training.num_epochs=1", "--training.weight_decay=0.1",
                     "--training.average_decay=0.9", "--training.warmup_steps=0")
    tuned = checkpoint.load_system(run / "checkpoints/latest.pt", "cpu")
    checkpoint.export(tuned, str(tmp_path / "out"))
    before, after = (funasr.read_weights(folder / "model.pt") for folder in (kit(variant), tmp_path / "out"))
    assert set(before) == set(after)
    kept = {name for name, x in before.items() if torch.equal(x, after[name])}
    assert kept == {name for name in before if re.search("bias_[edo]|hotword|seaco|lstm_proj|embed.0", name)}

@pytest.mark.parametrize("variant", ["seaco", "contextual"])
@torch.no_grad()
def test_int8_covers_the_second_decoder_and_keeps_the_embedding_of_hotwords(variant, monkeypatch):  # C140
    if not checkpoint.runs_on("int8", torch.device("cpu")):
        pytest.skip("this processor has no int8 products")
    monkeypatch.setattr("packed.LARGE", 0)
    system, exact = (checkpoint.load_system(kit(variant), "cpu", precision) for precision in ("int8", "float32"))
    part = system.model.hotword_decoder if variant == "seaco" else system.model.hotword_block
    assert not any(type(layer) is nn.Linear for layer in part.modules())
    kept = total = 0
    for name, result in results_by_recording(variant).items():
        hidden = recorded(variant, name)["enc"][None]
        lens, case = torch.tensor([hidden.shape[1]]), result["hot"]["several"]
        found = [x.model.with_hotwords([x.model.encode_hotwords(case["hotword_ids"][:-1])]).decode(hidden, lens, lens)
                 for x in (exact, system)]
        assert found[0].tokens[0].tolist() == case["ids_raw"]
        kept, total = kept + int((found[0].tokens == found[1].tokens).sum()), total + len(case["ids_raw"])
    assert kept >= 0.8 * total

# ---- vad: scores, segments, streams ----

@functools.lru_cache
def long_samples(name: str) -> torch.Tensor:
    """A long recording of the kit, as long_wavs.py builds it."""
    build = runpy.run_path(str(kit("long_wavs.py")))
    recipe = json.loads(kit("long_wavs.json").read_text())[name]
    return torch.from_numpy(build["render"](recipe).astype(np.float32) / 32768)

def vad_results(kind: str) -> dict:
    return kit_results("vad")[kind]

def told_vad(build: dict, generate: dict) -> vad.Vad:
    """The kit's VAD with options as FunASR's AutoModel and generate take them."""
    system = kit_vad()
    values = {key: value for key, value in {**build, **generate}.items() if hasattr(system.options, key)}
    options = config.from_dict(values, "test", system.options)
    schedule = ()
    if generate.get("dynamic_silence", "max_end_silence_time" not in {**build, **generate}):
        schedule = tuple(map(tuple, generate.get("silence_schedule", vad.SCHEDULE)))
    return system._replace(options=options, schedule=schedule, piece_ms=generate.get("chunk_size", 60000))

@needs_kit
@pytest.mark.parametrize("run", vad_results("offline") if KIT.is_dir() else [])
def test_vad_segments_are_funasrs_with_every_option(run):  # C172
    given = vad_results("offline")[run]
    system = told_vad(given["model"], given["generate"])
    for name, wanted in given["value"].items():
        if isinstance(wanted, dict):
            wanted = []  # FunASR divides by zero where there is no whole frame
        assert list(map(list, vad.segments_of(system, [long_samples(name)]))) == wanted, name

def test_vad_features_levels_and_scores_are_funasrs():
    system = kit_vad()
    system = system._replace(options=replace(system.options, snr_thres=0.0))  # else levels are not computed
    expected = np.load(kit("vad/expected/scores.npz"))
    names = [key.removesuffix("_sil") for key in expected if key.endswith("_sil")]
    assert len(names) == 15
    for name in names:
        _, feats, level = vad.next_features(system, vad.start(system), long_samples(name), True)
        with torch.inference_mode():
            scores = system.network(feats[None], system.network.start())[0][0].numpy()
        found = {"sil": scores[:, 0], "scores": scores, "feats": feats.numpy(), "decibel": level}
        for key, tolerance in (("sil", 5e-4), ("scores", 5e-4), ("feats", 3e-3), ("decibel", 1e-3)):
            if f"{name}_{key}" in expected:
                np.testing.assert_allclose(found[key], expected[f"{name}_{key}"], rtol=0, atol=tolerance)

def events_of(system: vad.Vad, samples: torch.Tensor, sizes: list[int]) -> tuple[list, list, list]:
    """[[number of the call, its events], ...] of a stream in pieces of these sizes: the last of which is the end, is
    not, or is followed by an empty one that is."""
    state, found = vad.start(system), []

    def hear(i: int, state, piece, is_last: bool):
        state, events = vad.feed(system, state, piece, is_last)
        return state, [[i, [list(event) for event in events]]] if events else []

    *pieces, last = samples.split(sizes)
    for i, piece in enumerate(pieces):
        state, more = hear(i, state, piece, False)
        found += more
    _, ended = hear(len(pieces), state, last, True)
    state, open_ = hear(len(pieces), state, last, False)
    _, empty = hear(len(sizes), state, samples[:0], True)
    return found + ended, found + open_, found + open_ + empty

@needs_kit
@pytest.mark.parametrize("run, name", [(run, name) for run, given in vad_results("streaming").items()
                                       for name in given["cases"]] if KIT.is_dir() else [])
def test_vad_streams_are_funasrs_call_by_call(run, name):  # C172 C173
    generate = vad_results("streaming")[run]["generate"]
    case = vad_results("streaming")[run]["cases"][name]
    system = told_vad({}, generate)._replace(announce=True)
    samples, size = long_samples(name), 16 * generate["chunk_size"]
    even = [size] * (len(samples) // size) + [len(samples) % size] * (len(samples) % size > 0)
    wanted = {"events": case["events"], "odd": case["events_odd"],
              "one": [[0, case["one_call"]]] if case["one_call"] else []}
    ended, never_ended, with_empty = events_of(system, samples, even)
    found = {"events": ended, "odd": events_of(system, samples, case["pieces_odd"])[0],
             "one": events_of(system, samples, [len(samples)])[0]}
    if name == "tiny399":
        wanted = dict.fromkeys(wanted, [])  # FunASR divides by zero
    assert found == wanted
    assert never_ended == case["events_never_final"]
    before = [event for event in with_empty if event[0] < len(even)]
    assert before == case["events_then_empty_final"]  # the empty call: nothing at FunASR, here what is still open ends
    assert [e for _, events in with_empty for e in events] == [e for _, events in found["events"] for e in events]

def test_vad_does_not_depend_on_the_cuts_into_calls():  # C172
    system = told_vad({}, {"chunk_size": 200})._replace(announce=True)
    samples = long_samples("endspeech")[:16000]
    states = []
    for sizes in ([1] * 16000, [16000], [7, 15993]):
        state = vad.start(system)
        for piece in samples.split(sizes):
            state, _ = vad.feed(system, state, piece)
        states.append(state)
    for state in states:
        assert state.detector == states[0].detector and state.detector.begin == 0
        assert all(map(torch.equal, (*state.past, state.heard), (*states[0].past, states[0].heard)))

@pytest.mark.parametrize("rate_hz", [16000, 8000])
def test_cut_speech_yields_the_samples_of_the_segments(tmp_path, monkeypatch, rate_hz):  # C172
    monkeypatch.setattr(audio, "CHUNK_SEC", 1)
    system, samples = kit_vad()._replace(piece_ms=1000), long_samples("pauses").repeat(2)
    audio.save_wav(tmp_path / "a.wav", samples, 16000)
    whole = torch.cat(list(audio.stream(tmp_path / "a.wav", rate_hz)))
    cut = vad.cut_speech(system, tmp_path / "a.wav", rate_hz)
    found, held = [], []
    for piece in cut:
        found.append(piece)
        held.append(len(cut.gi_frame.f_locals["held"]) - len(piece.samples))
    assert max(held) <= 1.6 * rate_hz       # of a recording of 69 s: a piece of 1 s, what the next one needs, an edge
    *_, (heard, wanted, is_last) = vad.at_both_rates(tmp_path / "a.wav", 16000, rate_hz)
    assert (len(heard), len(wanted), is_last) == (0, 0, True)
    wanted = list(vad.segments_of(system, [samples]))
    assert [round(piece.start_sec * 1000) for piece in found] == [begin for begin, _ in wanted] and len(wanted) > 12
    for piece, (begin, end) in zip(found, wanted):
        assert torch.equal(piece.samples, whole[begin * rate_hz // 1000:end * rate_hz // 1000])

def test_vad_keeps_no_more_of_an_hour_than_of_a_minute():  # C174
    system = kit_vad()
    sizes = {}
    for name in ("silence", "talk_b", "loud"):
        state, kept = vad.start(system), []
        minute = long_samples(name).repeat(20)[:960000]
        for _ in range(4):
            state, _ = vad.feed(system, state, minute)
            kept.append(len(state.waiting) + len(state.heard) + state.detector.t + 1 - state.detector.earliest())
        sizes[name] = kept
    assert max(sizes["silence"]) < 1100 and max(max(kept) for kept in sizes.values()) < 7000  # a segment and the edges

def test_vad_limits_are_exact():
    """The schedule's steps, speech that is just likely enough, and more silence than max_start_silence_time."""
    scheduled = SimpleNamespace(schedule=vad.SCHEDULE, options=vad.Options())
    for open_ms, limit_ms in ((0, 1850), (10000, 1850), (10001, 850), (20001, 650), (30001, 450), (40001, 250),
                              (50001, 50), (60000, 50), (60001, 0)):
        assert vad.limits(scheduled, open_ms) == (limit_ms, 0.5)
    scheduled.options = vad.Options(speech_to_sil_time_thres=0)
    assert vad.limits(scheduled, 60001) == (100, 0.5)
    assert vad.find_speech(vad.Options(), 0.5, np.array([0.25, 0.2501]), None, 0.0)[0] == [True, False]
    detector = vad.Detector(vad.Options())
    begins = [detector.step(True, 800, False) or detector.begin for _ in range(15)]     # 150 ms of speech
    assert begins == [-1] * 14 + [0]
    detector = vad.Detector(vad.Options(detect_mode=0, max_start_silence_time=100))
    ended = []
    for _ in range(11):
        assert detector.step(False, 800, False) is None
        ended.append(detector.done)
    assert ended == [False] * 10 + [True]
    assert vad.Detector(vad.Options(), t=100, begin=0, free=101).earliest() == 0        # an open segment is kept
    assert [vad.Detector(vad.Options(), t=100, free=free).earliest() for free in (0, 90)] == [61, 90]
    options = vad.Options(decibel_thres=40.0, snr_thres=10.0)
    levels = np.array([40.0, 39.9, 130.0, 40.0, 41.0])      # the third is noise: (130 + 99 * 30) / 100
    silence = np.array([0.0, 0.0, 1.0, 0.0, 0.0])
    assert vad.find_speech(options, 0.6, silence, levels, 30.0) == ([True, False, False, False, True], 31.0)
    assert vad.find_speech(options, 0.6, np.zeros(2), np.array([39.9, 40.0]), 0.0) == ([False, True], 0.0)

@pytest.mark.parametrize("limit_ms, frames, wanted, options", [
    (10, "." * 23 + "s" * 21 + "." * 20 + "s" * 60, [(30, 630), (640, 1240)],
     dict(sil_to_speech_time_thres=10, speech_to_sil_time_thres=10, do_extend=0)),
    (50, "s" + "." * 20, [(0, 80)], dict(window_size_ms=50, sil_to_speech_time_thres=10, speech_to_sil_time_thres=10,
                                         lookahead_time_end_point=10)),
    (0, "s" + "." * 20 + "s", [(0, 210)], dict(sil_to_speech_time_thres=10, speech_to_sil_time_thres=50)),
    (200, "s" * 24, [(0, 70), (70, 140), (140, 210)],
     dict(window_size_ms=50, sil_to_speech_time_thres=50, speech_to_sil_time_thres=0, max_single_segment_time=60)),
    (50, "sss", [(0, 30)], dict(detect_mode=0, window_size_ms=10, sil_to_speech_time_thres=10))])
def test_segments_of_planted_frames_are_funasrs(limit_ms, frames, wanted, options):  # C172
    """Recorded: FsmnVADStreaming.DetectOneFrame of FunASR 1.4.16; s is a frame of speech."""
    detector = vad.Detector(vad.Options(**options))
    found = []
    for i, frame in enumerate(frames):
        found.append(detector.step(frame == "s", limit_ms, i == len(frames) - 1))
    assert [segment for segment in found if segment] == wanted

def test_vad_levels_are_there_where_they_matter_and_an_open_segment_is_timed():
    """Thresholds just inside and outside; 400 samples of 0.5 have 20 dB. A schedule's clock runs in open segments."""
    system = vad.load_vad(str(kit("vad")))
    samples = torch.full((800,), 0.5)
    for change, matters in ((dict(decibel_thres=-60.0), False), (dict(decibel_thres=-59.9), True),
                            (dict(snr_thres=-87.0), False), (dict(snr_thres=-86.9), True)):
        told = system._replace(options=replace(system.options, **change))
        _, feats, level = vad.next_features(told, vad.start(told), samples, True)
        assert (level is not None) == matters and (not matters or level == pytest.approx([20.0] * len(feats), abs=1e-4))
        assert vad.next_features(told, vad.start(told), samples[:399], True)[2] is None     # no frame
    state = vad.start(system)
    assert (state.noise, state.open_ms) == (-100.0, 0)
    for begin, open_ms in ((-1, 0), (0, 60000), (7, 60000)):
        held = state._replace(detector=replace(state.detector, begin=begin))
        assert vad.feed_piece(system, held, torch.zeros(0), False)[0].open_ms == open_ms
    after, events = vad.feed_piece(system, state._replace(open_ms=5), long_samples("pauses"), False)
    assert events and after.open_ms == 0

def test_a_vad_config_that_leaves_its_options_out_has_funasrs(tmp_path):
    """The kit's has every one of them, with FunASR's own value; but for sizes, which are here those of fsmn-vad."""
    assert vad.Network() == vad.Network(400, 140, 4, 250, 128, 20, 0, 1, 0, 140, 248)
    path = kit("vad/config.yaml")
    (tmp_path / "config.yaml").write_text(re.sub("(?m)^(model|frontend)_conf:\n( .*\n)+", "", path.read_text()))
    assert vad.read_options(tmp_path / "config.yaml") == vad.read_options(path)
    others = dict.fromkeys("upsacle_samples snip_edges cmvn_file nn_eval_block_size dcd_block_size".split(), 0)
    assert funasr.read_section({"model_conf": others}, "model", vad.IGNORED, vad.Options(), "a") == vad.Options()
    for base, last in ((vad.FrontEnd(), dict(lfr_m=5, lfr_n=1, window="hamming", frame_length=25, frame_shift=10)),
                       (vad.Network(), dict(rorder=0, lstride=1, rstride=1)),
                       (vad.Options(), dict(detect_mode=1, do_extend=1, frame_in_ms=10, frame_length_ms=25))):
        assert config.from_dict(last, "a", base)
        for name, value in last.items():
            with pytest.raises(ValueError, match=f"a: {name}: wanted "):
                config.from_dict({name: "povey" if name == "window" else value + 1}, "a", base)

@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc")
@pytest.mark.parametrize("load, name, part", [
    (vad.load_vad, "vad", "encoder"), (punctuation.load_punctuation, "punc", "encoder"),
    (checkpoint.load_system, "sanm", "decoder"), (checkpoint.load_system, "seaco", "bias_encoder")])
def test_weights_of_a_directory_are_mapped_and_others_are_refused(tmp_path, load, name, part):  # C40 C152
    folder = kit_copy(name, tmp_path / name)
    loaded = load(str(folder))
    assert loaded and str(folder / "model.pt") in Path("/proc/self/maps").read_text()
    weights = funasr.read_weights(kit(name, "model.pt"))
    missing, other, *_ = [name for name in weights if name.startswith(part)]
    (folder / "model.pt").unlink()
    del weights[missing]
    torch.save({**weights, "extra": torch.zeros(1), other: torch.zeros(3)}, folder / "model.pt")
    wanted = f"missing {missing}; unused extra; {other} (3,), wanted {tuple(weights[other].shape)}"
    assert message_of(load, str(folder)).split("config: ")[1] == wanted

def test_a_part_that_is_not_there_is_told_with_its_download_and_another_is_refused(ckpt, capsys):
    for script, option, own, other in ((vad, "--vad", "fsmn-vad (2 MB)", kit("punc")),
                                       (punctuation, "--punctuate", "ct-punc (1050 MB)", kit("vad"))):
        wanted = f"{option} nowhere: wanted a directory as FunASR publishes {own}; download it with modelscope download"
        assert wanted in refusal(capsys, "--ckpt", ckpt, option, "nowhere", "a.wav")
        more = ["a.wav"] if script is vad else []
        for folder, words in (("nowhere", wanted), (other, "wanted model ")):
            assert words in refusal(capsys, folder, *more, script=script)

# ---- punctuation: marks, texts, realtime ----

@functools.lru_cache
def kit_punctuation(variant: str) -> punctuation.Punctuation:
    return punctuation.load_punctuation(str(kit(variant)))

def watched(monkeypatch) -> list[int]:
    """Tokens of every pass through the network, as they come."""
    lengths, choose = [], punctuation.choose_marks

    def spy(model, tokens, num_carried=0):
        lengths.append(len(tokens))
        return choose(model, tokens, num_carried)

    monkeypatch.setattr(punctuation, "choose_marks", spy)
    return lengths

def test_punctuated_texts_are_funasrs(monkeypatch):  # C175
    lengths, given, count = watched(monkeypatch), kit_results("punc"), 0
    for case in [*given["texts"], *given["empty"], *given["split_size"]]:
        lengths.clear()
        text, marks = punctuation.punctuate(kit_punctuation("punc"), case["input"], case.get("split_size", 20))
        assert (text, marks, lengths) == (case["text"], case["punc_array"], case["lengths"])
        count += len(lengths)
    assert count > 600 and max(max(case["lengths"], default=0) for case in given["texts"]) > 200
    lengths.clear()
    silent = kit_punctuation("punc")._replace(marks=("_",) * 6)
    ends = [word.ends_sentence for word in punctuation.punctuate_words(silent, ["好！", "hi!", "a,", "我"])]
    assert ends == [True, True, False, True]
    assert punctuation.punctuate(silent, "我" * 1500, 100)[0] == "我" * 1500 + "。" and 1000 < max(lengths) <= 1100
    inputs, texts = (ast.literal_eval(str(given["list"][key])) for key in ("input", "texts"))
    assert [punctuation.punctuate(kit_punctuation("punc"), text)[0] for text in inputs] == texts

@pytest.mark.parametrize("text, split_size, lengths, groups", [
    ("c10 x289", 50, [50, 100, 150, 200, 250, 289], [11, 289]),     # 200 tokens are not too long, 250 end at the comma
    ("c10 x324", 67, [67, 134, 201, 257, 324], [11, 324]),          # nor more than that without one
    ("c10 x190", 67, [67, 134, 201], [201]),                        # at the end of the text a comma stays
    ("s5 c100 x120", 201, [201, 221], [6, 221]),                    # a stop goes before a comma,
    ("s5 x1100", 1001, [1001, 1100], [6, 1100]),                    # also in what is far too long
    ("x2000", 500, [500, 1000, 1500, 500], [1500, 500]),            # where reading begins anew
    ("x2002", 1001, [1001, 1001], [1001, 1001])])
def test_long_texts_without_stops_are_cut_at_exact_lengths(monkeypatch, text, split_size, lengths, groups):
    """Tokens x, and c with a comma and s with a stop behind so many of them; 20 are read at a time otherwise."""
    tokens = []
    for part in text.split():
        tokens += ["x"] * int(part[1:]) + [part[0]] * (part[0] != "x")
    read = []

    def marks_of(model, piece, num_carried):
        read.append(len(piece))
        return ["_sc".index(token.replace("x", "_")) for token in piece]

    monkeypatch.setattr(punctuation, "choose_marks", marks_of)
    model = punctuation.Punctuation(None, {}, ("_", "。", "，", "！"), 3)
    found = [group for group in punctuation.mark_tokens(model, tokens, split_size) if group[0]]
    assert read == lengths and [len(group[0]) for group in found] == groups
    cut = {"c10 x289": 3, "c10 x324": 3, "c10 x190": 2}.get(text)   # the comma becomes sentence_end_id, or stays
    assert cut is None or found[0][1][10] == cut
    assert text != "x2000" or not any(found[0][1])                  # nothing is put where there is no comma
    assert (punctuation.SPLIT_SIZE, punctuation.LONGEST, punctuation.MOST) == (20, 200, 1000)
    assert punctuation.Options() == punctuation.Options(128, 256, (), 3)      # FunASR's
    refused("a: punc_list: wanted ", config.from_dict, {"punc_list": "_,"}, "a", punctuation.Options())
    assert punctuation.is_ascii("\x7f") and not punctuation.is_ascii("\x80")

@pytest.mark.parametrize("content, got", [
    ("{}", "a list of tokens with <unk>"), ('["a"]', "a list of tokens with <unk>"),
    ('{"<unk>": 0}', "a list of tokens with <unk>"), ("[", "a list of tokens in JSON, got")])
def test_a_vocabulary_of_punctuation_is_a_list_with_unk(tmp_path, content, got):
    (tmp_path / "tokens.json").write_text(content)
    refused(f"tokens.json: wanted {got}", punctuation.read_vocabulary, tmp_path / "tokens.json")

def test_realtime_punctuation_is_funasrs_call_by_call(monkeypatch):  # C175
    lengths, model = watched(monkeypatch), kit_punctuation("punc_realtime")
    for session in kit_results("punc_realtime")["sessions"]:
        carried = []
        for case in session:
            lengths.clear()
            assert len(carried) == case["vad_index"]
            text, marks, carried = punctuation.punctuate_more(model, carried, case["input"])
            assert (text, marks, carried, lengths) == tuple(
                case[key] for key in ("text", "punc_array", "pre_text", "lengths"))
    assert punctuation.punctuate_more(model, ["a"], " ") == ("", [], ["a"])

@pytest.mark.parametrize("variant", ["punc", "punc_realtime"])
def test_punctuation_scores_are_funasrs(variant):
    model, expected = kit_punctuation(variant).model, np.load(kit(variant, "expected/logits.npz"))
    assert {norm.eps for norm in model.modules() if isinstance(norm, nn.LayerNorm)} == {1e-12}  # FunASR's
    keys = [key for key in expected if "_ids" in key]
    assert len(keys) >= 9
    for key in keys:
        carried = 0
        if variant == "punc_realtime":
            session, call = map(int, key[1:].split("_")[:2])
            carried = kit_results(variant)["sessions"][session][call]["vad_index"]
        ids = torch.from_numpy(expected[key])
        with torch.inference_mode():
            hidden, logits = model.encode(ids, carried), model(ids, carried)
        np.testing.assert_allclose(hidden, expected[key.replace("ids", "enc")], rtol=0, atol=1e-4)
        np.testing.assert_allclose(logits, expected[key.replace("ids", "logits")], rtol=0, atol=5e-4)

def test_words_are_written_as_the_text_is():  # C176
    model = kit_punctuation("punc")
    for case in kit_results("punc")["texts"]:
        words = punctuation.split_tokens(case["input"])
        written = punctuation.punctuate_words(model, words)
        assert len(written) == len(words)
        text = "".join(" " * word.spaced + word.text for word in written)
        assert text == case["text"]
        ends = [model.marks[mark] in "。？" for mark in case["punc_array"]]
        if "<unk>" not in case["text"]:
            assert [word.ends_sentence for word in written][:-1] == ends[:-1]
    assert punctuation.punctuate_words(model, []) == []
    assert len(punctuation.punctuate_words(model, ["été", "hello", "我"])) == 3

def test_a_vocabulary_for_jieba_is_read_by_characters_and_said_so(tmp_path, capsys):
    folder = kit_copy("punc", tmp_path / "punc")
    (folder / "jieba_usr_dict").write_text("你好\n", encoding="utf-8")
    model = punctuation.load_punctuation(str(folder))
    assert capsys.readouterr().err.count("as jieba cuts them") == 1
    case = kit_results("punc")["texts"][2]
    assert punctuation.punctuate(model, case["input"])[0] == case["text"]

def test_the_commands_print_segments_and_punctuated_lines(tmp_path, capsys, monkeypatch):
    audio.save_wav(tmp_path / "a.wav", long_samples("pauses"), 16000)
    for schedule, run in (("config", "no_dynamic"), ("funasr", "default")):
        assert vad.main([str(kit("vad")), "--schedule", schedule, str(tmp_path / "a.wav")]) == 0
        rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
        assert [[int(a), int(b)] for a, b, _ in rows] == vad_results("offline")[run]["value"]["pauses"]
    for variant, cases in (("punc", kit_results("punc")["texts"][:9]),
                           ("punc_realtime", kit_results("punc_realtime")["sessions"][1])):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(case["input"] + "\n" for case in cases)))
        assert punctuation.main([str(kit(variant))]) == 0
        assert capsys.readouterr().out.splitlines() == [case["text"].strip() for case in cases]

# ---- report: words and forms ----

def planted_words(symbols, tokenizer) -> report.Result:
    """What read_result makes of symbols that last a second each, with probabilities 1, 1/2, 1/3, ..."""
    ids = torch.tensor([[tokenizer.symbols.index(symbol) for symbol in symbols]])
    n = len(symbols)
    found = Hypotheses(ids, torch.tensor([n]), -torch.arange(1.0, n + 1).log()[None],
                       [torch.arange(n + 1.0) * 100], torch.zeros(1, 4), [])
    return decode.read_result(tiny_system()._replace(tokenizer=tokenizer), found, 0)

@pytest.mark.parametrize("unit, symbols, text, words", [
    ("char", "ab cd ", "ab cd ", ["ab 0 2 1*2 s", "cd 3 5 4*5 s"]),
    ("char", "你好ab世", "你好ab世", ["你 0 1 1 s", "好 1 2 2", "ab 2 4 3*4", "世 4 5 5"]),
    ("char", " ", " ", []), ("char", "", "", []),
    ("word", ["ab", "你", "cd"], "ab 你 cd", ["ab 0 1 1 s", "你 1 2 2 s", "cd 2 3 3 s"]),
    ("piece", ["th@@", "at", "你", "a", "b", "%"], "that你AB %",
     ["that 0 2 1*2 s", "你 2 3 3", "AB 3 5 4*5", "% 5 6 6 s"]),
    ("piece", ["you", "<unk>", "at"], "you at", ["you 0 1 1 s", "at 1 2 3 s"])])     # D5: the time of <unk>
def test_words_of_every_unit_have_the_times_and_confidences_of_their_tokens(unit, symbols, text, words):  # C70
    known = (*SPECIALS, *dict.fromkeys(s for s in symbols if s != "<unk>"))
    vocabulary = PieceTokenizer(known, None) if unit == "piece" else Tokenizer(unit, known)
    result = planted_words(symbols, vocabulary)
    assert result.text == text and len(result.words) == len(words)
    for word, wanted in zip(result.words, words):
        name, start, end, members, *space = wanted.split()
        inverse = [int(n) for n in members.split("*")]
        assert word[:3] == (name, float(start), float(end)) and word.spaced == bool(space)
        assert word.confidence == pytest.approx(math.prod(inverse) ** (-1 / len(inverse)), abs=1e-4)

def with_words(words: list[report.Word]) -> report.Result:
    return report.Result("", 1.0, [], words)

def test_cues_end_before_seven_seconds_or_84_characters():  # C71
    words = [report.Word("w" * 9, i * 1.0, i + 0.5, 1.0) for i in range(20)]
    assert [len(cue) for cue in report.cues(with_words(words))] == [7, 7, 6]  # the 8th would end 7.5 s after the first
    fast = [report.Word("w" * 9, i * 0.1, i * 0.1 + 0.1, 1.0) for i in range(20)]
    assert [len(cue) for cue in report.cues(with_words(fast))] == [8, 8, 4]  # 8 * 9 letters + 7 spaces = 79, 9 make 89
    long = report.cues(with_words([report.Word("x" * 99, 0.0, 9.0, 1.0), report.Word("y", 9.0, 30.0, 1.0)]))
    assert [(report.join_words(cue), round(cue[0].start), round(cue[-1].end)) for cue in long] == [
        ("x" * 77, 0, 7), ("x" * 22, 7, 9), ("y", 9, 16)]       # 77 of 99 letters take 7 s; y is a word and stays one
    assert report.cues(with_words([])) == []
    tagged = report.subtitles(with_words([report.Word('"<unk>"', 3654.0, 3661.0, 1.0)]), "vtt")
    assert tagged == 'WEBVTT\n\n1\n01:00:54.000 --> 01:01:01.000\n"&lt;unk&gt;"\n\n'
    for size, count in ((43, 1), (44, 2)):                          # with 40 letters and a space: 84 and 85
        pair = [report.Word("x" * 40, 0.0, 1.0, 1.0), report.Word("y" * size, 1.0, 7.0, 1.0)]
        assert len(report.cues(with_words(pair))) == count
    for word in ("yes", "y" * 84):                                  # long in seconds only: whole, its end comes earlier
        assert report.split_word(report.Word(word, 9.0, 30.0, 1.0), []) == [report.Word(word, 9.0, 16.0, 1.0)]
    assert [report.belong_together("\u0e19", mark) for mark in "\u0e33\u0eb3\u0e01"] == [True, True, False]

@pytest.mark.parametrize("text, spelled, pieces", [
    ("กขคง。", [("กข@@", 2, 7), ("คง", 7, 12)], ["กข 2 7", "คง。 7 12"]),     # with the mark that punctuation put there
    ("กขคง", [("กขคง", 2, 12)], ["กข 2 7", "คง 7 12"]),                       # one token: a character every 2.5 s
    ("กขคง", [("ab", 2, 4), ("cd", 4, 12)], ["กข 2 7", "คง 7 12"]),           # spelled otherwise
    ("กขคง", [("กข", 2, 4), ("", 4, 5), ("คง", 5, 12)], ["กข 2 7", "คง 7 12"]),
    ("x" * 86, [("x" * 84, 2, 4), ("xx", 4, 8.5)], ["x" * 84 + " 2 4", "xx 4 8.5"]),
    ("x" * 86, [("x" * 85, 2, 4), ("x", 4, 10.6)], ["x" * 70 + " 2 9", "x" * 16 + " 9 10.6"])])
def test_a_word_too_long_for_a_subtitle_is_cut_where_its_tokens_end_or_evenly(text, spelled, pieces):  # C71
    tokens = [report.Token(text, 4, 1.0, start, end) for text, start, end in [("a", 0, 2), *spelled, ("z", 13, 14)]]
    cut = report.pack_words([report.Word(text, 2.0, spelled[-1][2], 1.0)], tokens)
    found = [f"{report.join_words(cue)} {cue[0].start:g} {cue[-1].end:g}" for cue in cut]
    assert found == pieces

def test_confidences_have_four_digits_and_no_token_spoils_a_word_wholly():
    sure, unsure = (report.Token("a", 4, p, 0.0, 1.0) for p in (1.0, 0.0))
    assert report.mean_confidence([sure, unsure]) == 0.0071 and report.mean_confidence([]) == 0.0  # sqrt(5e-5)

def test_ideographs_are_those_of_unicodes_blocks():
    edges = {"\u303f": False, "\u3040": True, "\u30ff": True, "\u3100": False, "\u33ff": False, "\u3400": True,
             "\u9fff": True, "\ua000": False, "\U0001ffff": False, "\U00020000": True, "一一": False}
    assert {text: report.is_ideograph(text) for text in edges} == edges

@pytest.mark.parametrize("text", [
    "น้ำกินข้าวเช้าเมื่อวานนี้ครับ", "ນ້ຳກິນເຂົ້າເຊົ້າມື້ວານນີ້", "ខ្ញុំបានញ៉ាំបាយពេលព្រឹក", "မြန်မာစာကိုရေးသည်"])
@pytest.mark.parametrize("seconds", [0.02, 0.2, 3.0, 9.0])
def test_subtitles_of_scripts_without_spaces_keep_both_limits_and_every_letter_whole(text, seconds):  # C71
    """One word of 6 texts, a token a character of so many seconds: cut at tokens, never before a mark on a letter."""
    text = text * 6
    tokens = [report.Token(c, 4, 0.9, round(i * seconds, 3), round((i + 1) * seconds, 3)) for i, c in enumerate(text)]
    found = report.cues(report.Result(text, 0.9, tokens, [report.Word(text, 0.0, tokens[-1].end, 0.9)]))
    texts = [report.join_words(cue) for cue in found]
    assert "".join(texts) == text and len(found) > 1 and max(map(len, texts)) <= 84
    assert max(cue[-1].end - cue[0].start for cue in found) < 7.0 + 1e-6
    starts = {token.start for token in tokens}
    assert all(cue[0].start in starts for cue in found)
    for before, after in zip(texts, texts[1:]):
        assert not unicodedata.category(after[0]).startswith("M") and before[-1] not in "เແໂ\u17d2"
    if seconds == 0.2:
        assert max(cue[-1].end - cue[0].start for cue in found[:-1]) > 5.5      # and no shorter than they must be

def test_every_form_is_written_as_its_readers_want_it():  # C33 C71
    words = [report.Word("one", 0.1, 0.4, 0.5), report.Word("<two>", 3661.0, 3661.5, 0.8)]
    nbest = (report.Alternative("one <two>", -0.1, 0.6), report.Alternative("one", -0.2, 0.5))
    tokens = [report.Token("one", 5, 0.5, 0.1, 0.4), report.Token("<two>", 6, 0.8, 3661.0, 3661.5, True)]
    outcome = report.Outcome(0, "a b", 3662.0004, "", report.Result("one <two>", 0.6, tokens, words, nbest))
    written = {name: form(outcome) for name, form in report.FORMS.items()}
    assert json.loads(written.pop("json")) == {
        "key": "a b", "text": "one <two>", "confidence": 0.6, "duration": 3662.0,
        "tokens": [{"token": "one", "id": 5, "confidence": 0.5, "start": 0.1, "end": 0.4},
                   {"token": "<two>", "id": 6, "confidence": 0.8, "start": 3661.0, "end": 3661.5, "hotword": True}],
        "words": [{"word": w.text, "start": w.start, "end": w.end, "confidence": w.confidence} for w in words],
        "nbest": [{"text": "one <two>", "score": -0.1, "confidence": 0.6},
                  {"text": "one", "score": -0.2, "confidence": 0.5}]}
    assert json.loads(report.FORMS["json"](outcome._replace(reference="one too")))["reference"] == "one too"
    assert written == {
        "txt": "one <two>\n", "tsv": "start\tend\ttext\n100\t400\tone\n3661000\t3661500\t<two>\n",
        "srt": "1\n00:00:00,100 --> 00:00:00,400\none\n\n2\n01:01:01,000 --> 01:01:01,500\n<two>\n\n",
        "vtt": "WEBVTT\n\n1\n00:00:00.100 --> 00:00:00.400\none\n\n"
               "2\n01:01:01.000 --> 01:01:01.500\n&lt;two&gt;\n\n",
        "ctm": "a_b 1 0.100 0.300 one 0.5000\na_b 1 3661.000 0.500 <two> 0.8000\n"}
    assert report.FORMS["ctm"](outcome._replace(key=" ")).startswith("_ 1 0.100")
    assert '"key": "你"' in report.FORMS["json"](outcome._replace(key="你"))

def test_file_names_are_safe_and_never_the_same():  # C73
    keys = ["x/a.wav", "y/A.wav", "a", "spk.utt2", "../..", "", "你" * 99, "a-2"]
    cut = "你" * 29 + "..." + "你" * 29
    assert outputs.file_names(keys) == ["x/a", "y/A", "a", "spk.utt2", "_/_", "_", cut, "a-2"]
    assert outputs.file_names(["a.wav", "A", "a", "a-2"]) == ["a", "A-2", "a-3", "a-2-2"]
    assert outputs.file_names(["/d/x/a.wav", "/d/x/b.WAV", "/d/y/a.wav"]) == ["x/a", "x/b", "y/a"]
    assert outputs.safe_name("n" * 180) == "n" * 180 and outputs.safe_name("n" * 181) == "n" * 88 + "..." + "n" * 88
    talk = "a talk on what is to be remembered of a long evening, " * 5
    first, second = outputs.file_names([f"/d/{talk}part 1.mp3", f"/d/{talk}part 2.mp3"])
    assert first.endswith("part 1") and second.endswith("part 2") and first.startswith("a talk on what")
    assert outputs.file_names(["audio.wav"] * 20000)[-1] == "audio-20000"  # not quadratic: 0.2 s

def test_subtitles_break_at_sentences_then_commas_then_where_they_must():  # C178
    def said(*sentences: str) -> report.Result:
        """Every word takes half a second."""
        found, t = [], 0.0
        for text in sentences:
            words = [report.Word(word, t + i / 2, t + (i + 1) / 2, 1.0) for i, word in enumerate(text.split())]
            t = words[-1].end
            found.append(report.Sentence(text, words[0].start, t, words))
        return report.Result("", 1.0, [], [], sentences=tuple(found))

    def cut(*sentences: str) -> list[str]:
        return [report.join_words(cue) for cue in report.cues(said(*sentences))]

    assert cut("A b.", "C?", "D e.") == ["A b.", "C?", "D e."]
    nine, seven = "a " * 8 + "a,", "b " * 6 + "b,"
    assert cut(f"{nine} {seven} c d.") == [nine, f"{seven} c d."]  # 4.5 s, then 3.5 + 1 s; all at once would be 9
    assert cut("a " * 19 + "a.", "B.") == [" ".join("a" * 14), "a a a a a a.".removeprefix(""), "B."]
    assert cut(f"{seven} " + "c " * 19 + "c.") == [seven, " ".join("c" * 14), "c c c c c c."]
    assert report.cues(said()) == [] and report.written_text(said("A b.", "C?")) == "A b. C?"
    assert report.sentence_entries(said("A?")) == [{"text": "A?", "start": 0.0, "end": 0.5, "words": [
        {"word": "A?", "start": 0.0, "end": 0.5, "confidence": 1.0}]}]

# ---- report: report.html ----

class PageReader(html.parser.HTMLParser):
    """The tags, the attributes, and the texts with the tag that they stand in."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], collections.Counter(), [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.attributes += attributes
        if tag not in ("meta", "path", "image", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("path", "image", "rect"):
            assert self.open.pop() == tag

    def handle_data(self, text):
        self.texts.append((self.open[-1] if self.open else "", text))

def test_a_page_shows_errors_by_their_kind_and_no_hostile_text_leaves_its_place():  # C98
    hostile = "<script src='http://x/'>&\"]]>--></article>"
    svg = plot.alignment_svg(hostile, torch.rand(20, 4), torch.rand(9), [(hostile, 0.1, 0.2)], 0.5, (0.0, 0.5))
    pairs = {"worse": ("a b c d", ""), hostile: (f"{hostile[:7]} two今x", "one two今 y z"), "good": ("a b", "a b")}
    result = lambda text: report.Result(text, 1.0, [], [])
    encode = tiny_system().tokenizer.encode
    cases = [(report.score(report.Outcome(0, key, 1.0, ref, result(hyp)), encode), svg if key == hostile else "")
             for key, (ref, hyp) in pairs.items()]
    page = report.report_html(hostile, [f"WER {hostile}", "甲"], cases)
    read = PageReader(page)
    assert not read.open and read.tags["script"] == 0 and read.tags["article"] == 3 and read.tags["svg"] == 3
    texts = lambda tag: [text for name, text in read.texts if name == tag]
    assert texts("h3") == ["worse", hostile, "good"] and texts("h1") == [hostile]
    assert texts("pre") == [f"WER {hostile}\n甲"]
    assert texts("del") == ["replaced", "missing", "a", "b", "c", "d", "<script", "x"]
    assert texts("ins") == ["by", "too many", "one", "y", "z"] and read.tags["span"] == 1 + 2
    assert texts("summary") == ["texts", "texts and picture", "texts"]
    assert [text for text in texts("small") if "errors" in text] == [
        "errors: 4 in 4 (0 replaced, 4 missing, 0 too many)", "errors: 3 in 4 (2 replaced, 0 missing, 1 too many)",
        "errors: 0 in 2 (0 replaced, 0 missing, 0 too many)"]
    addresses = [value for name, value in read.attributes if name in ("src", "href", "srcset", "action", "data")]
    assert addresses and all(value.startswith("data:image/png;base64,") for value in addresses)
    assert "url(" not in page and "@import" not in page and "default-src 'none'" in page

def test_the_report_shows_the_worst_first_and_at_most_so_many(tmp_path, monkeypatch):  # C98
    """Planted references: what was recognised, and n more ideographs, which are n missing ones."""
    drawn = []
    nothing = report.score(report.Outcome(0, "a", 1.0, "a", report.Result("", 0.0, [], [])), list)
    report.write_report(tmp_path, [nothing] * 51, [], lambda i: drawn.append(i) or "")
    assert len(drawn) == 50
    monkeypatch.setattr(report, "WORST", 3)
    system, paths = tiny_system(), [spoken(tmp_path / f"{i}.wav", 0.3 + 0.1 * i) for i in range(5)]
    dataset = decode.open_inputs(system, paths, tmp_path)
    results = decode.transcribe(system, [dataset[i].feats for i in range(5)])
    missing = [2, 0, 9, 1, 4]
    scores = [report.score(report.Outcome(i, paths[i], 1.0, result.text + "好" * n, result), system.tokenizer.encode)
              for i, (n, result) in enumerate(zip(missing, results))]
    picture = functools.partial(decode.alignment_picture, system, dataset)
    report.write_report(tmp_path, scores, ["planted", "lines"], picture)
    read = PageReader((tmp_path / "report.html").read_text())
    assert [text for tag, text in read.texts if tag == "h3"] == [paths[i] for i in (2, 4, 0)]
    titles = [text for tag, text in read.texts if tag == "text" and "wav:" in text]
    assert titles == [plot.fit(f"{paths[i]}: {results[i].text}", plot.WIDTH) for i in (2, 4, 0)]
    assert ("pre", "planted\nlines") in read.texts
    report.write_report(tmp_path, [], [], picture)
    assert "article" not in PageReader((tmp_path / "report.html").read_text()).tags

# ---- streaming: chunk by chunk ----

STREAMING_KITS = ("streaming", "streaming_alt")
SETTINGS = {"a": streaming.Chunk(), "b": streaming.Chunk(10, 5, 1, 2, 5), "c": streaming.Chunk(8, 4, -1, 0),
            "d": streaming.Chunk(10, 5, 0, 0)}

def streaming_cases(variant) -> dict[str, tuple[torch.Tensor, dict]]:
    """{case: (its samples, its part of the results)}"""
    cases = {}
    for name, case in results_by_recording(variant).items():
        samples, _ = audio.load_wav(kit("wavs", case["wav"]))
        cases[name] = samples[:case["samples"]], case
    return cases

def stream_through(system, chunk, pieces, then_empty=False):
    """Pieces through one stream, the last one final -> the result of each call, the state after them"""
    state = streaming.start(system, chunk)
    results = []
    for i, piece in enumerate(pieces):
        state, result = streaming.feed(system, state, piece, last=not then_empty and i == len(pieces) - 1)
        results.append(result)
    if then_empty:
        state, result = streaming.feed(system, state, torch.zeros(0), last=True)
        results.append(result)
    return results, state

def spelled(tokens):
    return write_sentence(spell_words([token.token for token in tokens]))

def same_states(one, other):
    flat = [(*state._replace(carry=None), *state.carry) for state in (one, other)]
    for ours, theirs in zip(*flat, strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs

@pytest.mark.parametrize("setting", SETTINGS)
def test_it_does_not_matter_how_samples_are_cut_to_the_last_bit(setting):  # C161
    """Single samples, random pieces and a whole recording, the states in between too"""
    system = kit_system("streaming")
    samples = streaming_cases("streaming")["libri_dev"][0]
    rng = random.Random(0)
    for cut in ([9000, *[1] * 300], [rng.randint(0, 9000) for _ in range(8)]):
        stop = sum(cut)
        one, _ = streaming.feed(system, streaming.start(system, SETTINGS[setting]), samples[:stop])
        state = streaming.start(system, SETTINGS[setting])
        tokens = []
        for piece in samples[:stop].split(cut):
            state, result = streaming.feed(system, state, piece)
            tokens += result.tokens
        same_states(one, state)
        ended, result = streaming.feed(system, state, samples[stop:], last=True)
        assert tokens + result.tokens == stream_through(system, SETTINGS[setting], [samples])[0][0].tokens
        same_states(ended, streaming.start(system, SETTINGS[setting]))

@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("variant", STREAMING_KITS)
def test_every_chunk_of_a_stream_equals_funasrs(variant, setting, monkeypatch):  # C43 C160
    """Recorded values and tolerances: funasr_kit/<variant>/expected and its README; features are our own."""
    system, chunk = kit_system(variant), SETTINGS[setting]
    seen = []  # of each chunk: state before, features, window's encoder output, its counted weights, what cif_step gave
    usual_cut, usual_cif = streaming.cut_chunk, streaming.cif_step

    def cut(*args):
        if (part := usual_cut(*args)) is not None:
            seen.append([part])
        return part

    def cif_step(hidden, alpha, *rest):
        seen[-1] += [hidden, alpha, usual_cif(hidden, alpha, *rest)]
        return seen[-1][-1]

    monkeypatch.setattr(streaming, "cut_chunk", cut)
    monkeypatch.setattr(streaming, "cif_step", cif_step)
    logits = outputs_of(system.model.decoder.output, monkeypatch)
    for name, (samples, case) in streaming_cases(variant).items():
        run = case["runs"][setting]
        wanted = recorded(variant, name)
        seen.clear()
        logits.clear()
        results, _ = stream_through(system, chunk, samples.split(run["pieces"]))
        assert len(seen) == len(run["chunks"])
        fired = iter(logits)
        tokens = []
        for i, (part, hidden, alpha, (embeds, spans, carry)) in enumerate(seen):
            about, key = run["chunks"][i], f"{setting}{i}_"
            if not about["tail"]:
                assert len(part.feats) == about["frames_in"]
            assert (part.is_last, part.state.frames) == (about["final"], about["start_idx"])
            if f"{key}feats" in wanted and not about["tail"]:
                close(part.feats, wanted[f"{key}feats"], 3e-4)
            close(hidden, wanted[f"{key}enc"], 1e-4)
            close(alpha, wanted[f"{key}alphas"], 3e-5)
            close(carry.weight[None], wanted[f"{key}carry_alpha"], 3e-4)
            close(carry.frame[None], wanted[f"{key}carry_hidden"], 2e-3)
            assert len(embeds) == about["token_num"]
            if len(embeds):
                close(embeds, wanted[f"{key}embeds"], 5e-4)
                scores = next(fired)[0]
                close(scores, wanted[f"{key}logits"], 5e-3)
                assert scores.argmax(-1).tolist() == about["ids_raw"]
            tokens += about["tokens"]
        assert [token.token for result in results for token in result.tokens] == run["tokens"] == tokens

@pytest.mark.parametrize("variant", STREAMING_KITS)
def test_the_text_of_every_call_is_funasrs_where_it_loses_nothing(variant):  # C160
    """Recorded: results.json. FunASR spells each call alone and loses what a call breaks off in (a piece, @@). A stream
    that has not ended keeps its last words back, and times never go back."""
    system, compared = kit_system(variant), 0
    for samples, case in streaming_cases(variant).values():
        for setting, run in case["runs"].items():
            calls = [(samples.split(run["pieces"]), run["texts"], False),
                     (samples.split(run["pieces_odd"]), run["texts_odd"], False)]
            if run.get("texts_then_empty_final"):
                calls.append((samples.split(run["pieces"]), run["texts_then_empty_final"], True))
            if setting == "a":
                calls.append(([samples], [case["text_a_in_one_call"]], False))
                calls.append((samples.split(9600), [*case["texts_a_never_final"], None], True))
            for pieces, texts, then_empty in calls:
                results, _ = stream_through(system, SETTINGS[setting], pieces, then_empty)
                for result, text in zip(results, texts, strict=True):
                    if text is not None and not any("@@" in token.token for token in result.tokens):
                        assert spelled(result.tokens) == text
                        compared += 1
                tokens = [token for result in results for token in result.tokens]
                assert results[-1].text == spelled(tokens)
                times = list(itertools.chain(*((token.start, token.end) for token in tokens)))
                assert times == sorted(times) and all(0 <= t <= len(samples) / 16000 + 0.12 for t in times)
                assert times == [round(t, 3) for t in times]
    assert compared > 100

@pytest.mark.parametrize("threads, calls", [(1, 9), (2, 4)])
@pytest.mark.parametrize("variant", STREAMING_KITS)
def test_a_batch_of_streams_equals_its_streams_alone_to_the_last_bit(variant, threads, calls):  # C162
    """Twelve streams that begin and end at different times, in all four settings."""
    torch.set_num_threads(threads)
    system, rng = kit_system(variant), random.Random(1)
    sources = [samples for samples, _ in streaming_cases(variant).values()]
    chunks = [SETTINGS[rng.choice("aaabcd")] for _ in range(12)]
    alone = [streaming.start(system, chunk) for chunk in chunks]
    together = list(alone)
    rest = [rng.choice(sources) for _ in chunks]
    for _ in range(calls):
        sizes = [rng.choice((0, 700, 9600, 9600, 20000)) for _ in chunks]
        pieces = [samples[:size] for samples, size in zip(rest, sizes)]
        last = [len(samples) <= size for samples, size in zip(rest, sizes)]
        rest = [rng.choice(sources) if ends else samples[size:] for samples, size, ends in zip(rest, sizes, last)]
        both = streaming.feed_many(system, together, pieces, last)
        together = [state for state, _ in both]
        for i in range(12):
            alone[i], result = streaming.feed(system, alone[i], pieces[i], last[i])
            assert result == both[i][1]
            same_states(alone[i], together[i])

def test_feeding_changes_no_state_and_one_can_go_back():  # C161
    system = kit_system("streaming")
    samples = streaming_cases("streaming")["libri_dev"][0]
    state, _ = streaming.feed(system, streaming.start(system), samples[:30000])
    kept = pickle.loads(pickle.dumps(state))
    first, said = streaming.feed(system, state, samples[30000:60000])
    streaming.feed(system, state, torch.zeros(50000), last=True)
    same_states(state, kept)
    again, repeated = streaming.feed(system, state, samples[30000:60000])
    assert said == repeated and said.tokens
    same_states(first, again)

def state_bytes(state):
    tensors = [state.samples, state.window, state.past, state.source, state.rows, state.carry.frame]
    return sum(x.untyped_storage().nbytes() for x in tensors)

@pytest.mark.parametrize("minutes, new", [(2, 20), pytest.param(60, 40, marks=slow)])
def test_a_long_stream_takes_constant_memory_and_linear_time(minutes, new):  # C163
    """All that a chunk is computed from has the same size in every minute. An hour in larger chunks, heard sooner."""
    system = kit_system("streaming")
    speech = torch.cat([samples for samples, _ in streaming_cases("streaming").values()] * 5)[:60 * 16000]
    state, sizes = streaming.start(system, streaming.Chunk(new, 5)), []
    for _ in range(minutes):
        state, result = streaming.feed(system, state, speech)
        sizes.append(state_bytes(state))
    assert len(speech) == 60 * 16000 and len(set(sizes)) == 1 and sizes[0] < 20_000 * new and len(state.recent) < 20
    assert len(result.text) > 20 * minutes

def test_the_text_so_far_is_that_of_one_pass_over_all_tokens():  # C160
    """Random symbols of the kit's vocabulary and of units of our own, in random portions"""
    assert write_sentence(spell_words(["ab", "", "cd"])) == "ab cd"
    rng = random.Random(0)
    pieces = kit_system("streaming").tokenizer
    ours = [Tokenizer.build(["one two three", "four"], unit) for unit in ("word", "char")]
    for vocabulary in [pieces] * 300 + ours * 20:
        symbols = rng.choices(vocabulary.symbols[4:], k=rng.randint(1, 30))
        state = streaming.start(kit_system("streaming"))
        said = []
        while len(said) < len(symbols):
            portion = symbols[len(said):len(said) + rng.randint(1, 4)]
            state, text = streaming.write_on(vocabulary, state, portion)
            said += portion
            if vocabulary is pieces:
                assert text == write_sentence(spell_words(said)), said
            else:
                assert text == (" " if vocabulary.unit == "word" else "").join(said)

def test_on_a_terminal_the_text_that_grows_takes_one_line_and_then_stays(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(listen, "pieces_of", lambda name, pcm_hz, rate_hz: [])
    monkeypatch.setattr(listen, "hear_stream", lambda system, pieces: [streaming.StreamResult([], "abcdefgh")])
    for columns, shown in ((11, "defgh"), (12, "defgh"), (13, "cdefgh"), (40, "abcdefgh")):
        monkeypatch.setattr(listen.shutil, "get_terminal_size", lambda: os.terminal_size((columns, 9)))
        listen.show_streams(tiny_system(), ["a"], None)
        assert capsys.readouterr().out == f"{survival.ERASE}{shown}{survival.ERASE}abcdefgh\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    for tokens, count in (([], 0), ([report.Token("你", 4, 1.0, 0.0, 0.1)], 1)):  # into a pipe
        listen.show_growing("a", streaming.StreamResult(tokens, "你"))
        assert capsys.readouterr().out.count('"text": "你", ') == count

def test_planted_weights_fire_where_and_when_they_say():  # C166
    """Weights of 0.25: a token every four frames, across pieces; a carried half is completed by a tail of half a one"""
    hidden = normal(0, 10, 3)
    carry = model.Carry(torch.zeros(()).double(), torch.zeros(3), -1.0)
    fired, spans = [], []
    for first, stop, *tail in ((0, 2), (2, 3), (3, 4), (4, 9), (9, 10, 0.5)):
        embeds, places, carry = model.cif_step(hidden[first:stop], torch.full((stop - first,), 0.25), carry, first,
                                               *tail)
        fired += list(embeds)
        spans += places
    for u, embed in enumerate(fired):
        close(embed, hidden[4 * u:4 * u + 4].sum(0) / 4, 1e-6)
    assert [end for _, end in spans] == pytest.approx([4, 8, 11])  # the tail is a frame of its own
    assert [begin for begin, _ in spans] == pytest.approx([0.4, 4.4, 8.4]) and float(carry.weight) == 0

@pytest.mark.parametrize("chunk, words", [
    ((10, 0), "wanted 1 look-ahead frame or more, got 0: the next"), ((0, 5), "wanted 1 new frame or more"),
    ((10, 5, -2), "look-backs of -1 or more"), ((10, 5, 4, -2), "look-backs of -1 or more"),
    ((10, 5, 4, 1, -1), "0 old ones or more")])
def test_chunks_that_cannot_be_are_refused_with_the_reason(chunk, words):  # C167
    assert streaming.Chunk(1, 1, -1, -1, 0).new == 1 and streaming.Chunk() == streaming.Chunk(10, 5, 4, 1, 0)
    refused(words, streaming.Chunk, *chunk)

@pytest.mark.parametrize("samples, words", [
    (torch.full((9,), torch.nan), "finite"), (torch.zeros(3, 3), r"\(n,\) float32"),
    (torch.zeros(9, dtype=torch.int16), "int16"), (torch.full((9600,), 3e38), "features not finite")])
def test_samples_that_cannot_be_are_refused(samples, words):
    system = kit_system("streaming")
    refused(words, streaming.feed, system, streaming.start(system), samples)

def test_a_single_block_without_cross_attention_takes_part(tmp_path):  # C160
    """FunASR leaves it out of a stream, though the model was trained with it."""
    folder = kit_copy("streaming_alt", tmp_path / "model")
    text = (folder / "config.yaml").read_text()
    encoder, decoder = text.split("decoder_conf:")
    (folder / "config.yaml").write_text(f"{encoder}decoder_conf:{decoder.replace('num_blocks: 3', 'num_blocks: 2', 1)}")
    weights = torch.load(folder / "model.pt", weights_only=True)
    weights = {name: x for name, x in weights.items() if not name.startswith("decoder.decoders2.1.")}
    (folder / "model.pt").unlink()
    torch.save(weights, folder / "model.pt")
    system = checkpoint.load_system(folder, "cpu")
    assert len(system.model.decoder.memory_blocks) == 1
    samples = streaming_cases("streaming_alt")["edge"][0]
    said = []
    for scale in (1.0, 50.0):
        system.model.decoder.memory_blocks[0].memory.weight.data *= scale
        said.append(stream_through(system, streaming.Chunk(), [samples])[0][0])
    assert said[0].tokens != said[1].tokens

# ---- chunked: all chunks of an utterance at once ----

GEOMETRIES = [(8, 4, 4, 2, 4), (10, 5, 4, 1, 0), (10, 5, 1, 2, 5), (8, 4, -1, 0, 0), (4, 2, 0, 0, 3), (1, 1, 2, 1, 0),
              (3, 7, 1, 3, 9), (50, 3, 4, 1, 0), (2, 5, 2, 2, 8)]

def chunked_system(chunk=GEOMETRIES[0], bias=0.0):
    """A streaming model of random weights that fires every other frame of 40 ms or, with a bias of -3, every tenth."""
    sizes = dict(kind="sanm", hidden_dim=16, num_heads=2, ffn_dim=32, kernel_size=5, dropout=0.0)
    section = config.ModelConfig(
        name="streaming", encoder=config.EncoderConfig(num_layers=3, **sizes),
        predictor=config.PredictorConfig("dense", tail=0.45),
        decoder=config.DecoderConfig(num_layers=2, memory_shift=2, **sizes), chunk=config.ChunkConfig(*chunk))
    options = config.DataConfig(kind="manifest", train="x", dev="x", sample_rate=8000, num_mels=10, lfr_m=7, lfr_n=4)
    torch.manual_seed(1)
    network = build(section, 70, 12).eval()
    network.predictor.firing.weight.data *= 8
    network.predictor.firing.bias.data += bias
    stats = torch.stack([torch.full((70,), 8.0), torch.full((70,), 0.3)])
    return checkpoint.System(config.Config(section, options), Tokenizer.build(["a b c d e f g h"], "word"), stats,
                             network, chunk=streaming.Chunk(*chunk))

def chunk_by_chunk(system, feats):
    """feats (T,F) -> hidden (L,D) and alpha (L,) of the rows that count, logits (U,V), by a stream's own functions"""
    chunk, state = system.chunk, streaming.start(system, system.chunk)
    hiddens, alphas, logits = [], [], [torch.zeros(0, 12)]
    parts = feats.split(chunk.new)
    for i, part in enumerate(parts):
        due = streaming.Due(state, part, i == len(parts) - 1)
        hidden, alpha, states = streaming.encode(system, [due])
        fired = streaming.integrate(system, due, states[0], hidden[0], alpha[0])
        state = fired[0]
        if len(fired[2]):
            (state,), scores = streaming.decode(system, [fired])
            logits += scores
        counted = slice(chunk.old, None if due.is_last else chunk.old + chunk.new)
        hiddens.append(hidden[0, counted])
        alphas.append(alpha[0, counted])
    return torch.cat(hiddens), torch.cat(alphas), torch.cat(logits)

@pytest.mark.parametrize("bias", [0.0, -3.0])
@pytest.mark.parametrize("chunk", GEOMETRIES)
@torch.no_grad()
def test_a_batch_of_whole_utterances_gives_what_each_gives_chunk_by_chunk(chunk, bias):  # C5 C168
    system, lens = chunked_system(chunk, bias), ints(41, 40, 1, 7, 26, 0)
    feats = normal(0, 6, 41, 70, dtype=torch.float32)
    feats[~padding_mask(lens, 41)] = math.nan  # what pads may hold anything
    net = system.model
    hidden, hidden_lens = net.encode(feats, lens)
    alpha = net.weigh(hidden, hidden_lens)
    counts, embeds = net.integrate(hidden, alpha)
    logits = net.predict(embeds, counts, hidden, hidden_lens, alpha).logits
    assert counts.max() > (15 if not bias else 3) and not alpha[~padding_mask(hidden_lens, alpha.shape[1])].any()
    found = net.greedy(feats, lens)
    assert hidden_lens[-1] == counts[-1] == 0
    for i, T in enumerate(lens[:-1].tolist()):
        L, n = hidden_lens[i], counts[i]
        assert L == T + system.chunk.ahead and torch.equal(found.tokens[i, :n], logits[i, :n].argmax(-1))
        for whole, part in zip((hidden[i, :L], alpha[i, :L], logits[i, :n]), chunk_by_chunk(system, feats[i, :T])):
            assert_same(whole, part, 3e-5)
        edges = boundaries(alpha[i, :L], n.item()) - system.chunk.ahead
        assert torch.equal(found.boundaries[i], edges.clamp(0, T))

def test_padding_changes_no_loss_and_no_gradient_of_a_streaming_model():  # C5 C168
    check_padding(chunked_system((4, 2, 1, 1, 1)).model.double().train(), ragged(1, width=70))

def test_a_streaming_model_learns_utterances_by_heart():  # C168
    batch = tiny_batch(4)
    section = replace(chunked_system((5, 3, 2, 1, 2)).config.model, sampling_ratio=0.5)
    torch.manual_seed(0)
    network = build(section, 8, 8)
    optimizer = train.make_optimizer(network, 0.0)
    losses = []
    for number in range(80):
        step = train.train_step(network.train(), optimizer, batch, 1e-2, config.TrainingConfig(), number)
        losses.append(step.sums["loss"] / step.tokens)
    assert losses[-1] < 0.2 * losses[0]
    assert torch.equal(network.eval().greedy(batch.feats, batch.feat_lens).tokens, batch.tokens)

@pytest.mark.parametrize("options, chunk", [([], GEOMETRIES[0]),
                                            (["--chunk", "3,2", "--look-back", "1,2"], (3, 2, 1, 2, 4))])
def test_a_streaming_checkpoint_is_decoded_with_the_chunks_of_training(tmp_path, capsys, options, chunk):  # C164 C168
    path, wav = saved(chunked_system(), tmp_path / "s.pt"), tmp_path / "a.wav"
    audio.save_wav(wav, 0.1 * normal(3, 320 * 45), 8000)
    samples, _ = audio.load_wav(wav)
    system = chunked_system(chunk)
    feats = audio.frontend(samples, 8000, system.config.data, system.stats)
    found = system.model.greedy(feats[None], ints(45))
    wanted = [found.tokens[0, u].item() for u in spoken_places(found.tokens[0].tolist())]
    assert decode.main(["--ckpt", path, str(wav), *options, "--output", str(tmp_path / "o.jsonl")]) == 0
    row = json.loads((tmp_path / "o.jsonl").read_text())
    assert [token["id"] for token in row["tokens"]] == wanted and len(wanted) > 10
    capsys.readouterr()
    assert decode.main(["--ckpt", path, "--stream", str(wav), *options]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["text"] == row["text"]

@pytest.mark.parametrize("part, changed, line", [
    ("decoder", dict(num_layers=2, attention_layers=1), "decoder.attention_layers: wanted 0, all layers"),
    ("decoder", dict(memory_shift=1), "decoder.memory_shift: wanted 2, half of kernel_size"),
    ("predictor", dict(tail=0.0), "predictor.tail: wanted a weight")])
def test_what_streaming_model_cannot_be_trained_is_refused_by_name(part, changed, line):  # C167
    whole = chunked_system().config
    section = replace(whole.model, **{part: replace(getattr(whole.model, part), **changed)})
    refused(f"model: {line}", checkpoint.start_from, replace(whole, model=section))

# ---- checkpoint: published models, inference ----

@functools.cache
def published(variant, **changes):
    """(config, model in eval mode) of a kit variant"""
    found = funasr.read_published_config(kit(variant, "config.yaml"))
    found = replace(found, model=replace(found.model, **changes))
    return found, checkpoint.load_directory(kit(variant), found).model.eval()

def recorded(variant, name):
    arrays = np.load(kit(variant, f"expected/{name}.npz")).items()
    return {key: torch.from_numpy(value) for key, value in arrays if value.dtype.kind != "U"}

def close(got, expected, atol):
    torch.testing.assert_close(got, expected.to(got.dtype), atol=atol, rtol=0)

@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_every_stage_equals_funasr(variant):  # C1 C15 C43
    """Recorded values and tolerances: funasr_kit/<variant>/expected and its README."""
    options, net = published(variant)
    stats = funasr.read_cmvn(kit(variant, "am.mvn"), audio.feature_dim(options.data))
    for name in WAVS:
        wanted = recorded(variant, name)
        samples, rate_hz = audio.load_wav(kit(f"wavs/{name}.wav"))
        feats = audio.frontend(samples, rate_hz, options.data, stats)
        close(feats, wanted["feats"], 3e-4)
        hidden, lens, weights = net.encoder(feats[None], torch.tensor([len(feats)]))
        close(hidden[0], wanted["enc"], 1e-4)
        alpha = net.predictor(hidden, lens)
        close(alpha[0], wanted["alphas_raw"], 3e-5)
        counts, embeds = net.integrate(hidden, alpha)
        assert counts.item() == wanted["token_num"].item()
        close(embeds[0], wanted["embeds"], 5e-4)
        logits, others = net.decoder(embeds, counts, hidden, lens)
        close(logits[0], wanted["logits"], 5e-3)
        assert weights == others == []
        assert torch.equal(logits[0].argmax(-1), wanted["ids_raw"])
        if net.ctc is not None:
            close(net.ctc(hidden)[0], wanted["ctc_logits"], 5e-3)
        if net.timing is not None:
            weights = net.timing(hidden, lens)[0]
            close(weights * (counts / weights.sum()), wanted["us_alphas"], 3e-5)

@pytest.mark.parametrize("case", range(4))
def test_cif_equals_both_of_funasrs_rules_where_no_weight_exceeds_1(case):  # C43
    """Recorded: units.npz, cif<i>: v1 (merge) and seq (delay), each with the whole tokens only."""
    units = {key.removeprefix(f"cif{case}_"): torch.from_numpy(value)
             for key, value in np.load(kit("units/units.npz")).items() if key.startswith(f"cif{case}_")}
    hidden, alpha = units["hidden"], units["alphas"]
    assert alpha.max() <= 1
    whole = alpha.double().sum(1).floor().long()  # ours also embeds an unfinished token
    for name in ("v1_embeds", "seq_embeds"):
        U = units[name].shape[1]
        found = model.cif(hidden, alpha.double(), U) * attention.padding_mask(whole, U)[:, :, None]
        close(found, units[name], 2e-5)
    tail = units["tail_alphas"].sum() - alpha.sum()
    counts = (alpha.double().sum(1) + tail.double() / len(alpha)).floor()
    assert torch.equal(counts, units["tail_num"].double())

def test_training_fires_what_funasr_fires_and_what_it_loses():  # C47
    """Recorded: cif0 to cif3 of units.npz, weights scaled to whole sums; FunASR lost the last token of three."""
    units, lost = np.load(kit("units/units.npz")), 0
    for case in range(4):
        hidden, alpha, wanted = (torch.from_numpy(units[f"cif{case}_{name}"])
                                 for name in ("hidden", "train_alphas", "train_embeds"))
        counts = alpha.double().sum(1).round().long()
        ours = model.cif(hidden, model.scale_weights(alpha, counts), wanted.shape[1])
        fired = wanted.abs().amax(-1) > 0
        close(ours[fired], wanted[fired], 1e-5)
        gone = attention.padding_mask(counts, wanted.shape[1]) & ~fired
        lost += int(gone.sum())
        assert (ours[gone].abs().amax(-1) > 0.1).all()
    assert lost == 3

@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_equals_its_utterances_one_by_one(variant):  # C45
    """Random batches of random parts of the kit's features: ids, counts, weights, times, and what is made of them."""
    system, (_, net), rng = kit_system(variant), published(variant), random.Random(0)
    sources = [recorded(variant, name)["feats"] for name in WAVS]
    for _ in range(4):
        spans = [(x, rng.randint(0, len(x) - 1)) for x in rng.choices(sources, k=6)]
        parts = [x[start:rng.randint(start + 1, len(x))] for x, start in spans]
        lens = torch.tensor([len(x) for x in parts])
        both = net.greedy(torch.nn.utils.rnn.pad_sequence(parts, batch_first=True), lens)
        results = decode.transcribe(system, parts)
        for i, x in enumerate(parts):
            result = decode.transcribe(system, [x])[0]
            assert [word[:3] for word in results[i].words] == [word[:3] for word in result.words]
            assert results[i].text == result.text
            alone = net.greedy(x[None], lens[i:i + 1])
            n = int(alone.lens[0])
            assert both.lens[i] == n and torch.equal(both.tokens[i, :n], alone.tokens[0]), (variant, lens, i)
            close(both.log_probs[i, :n], alone.log_probs[0], 1e-3)
            close(both.boundaries[i], alone.boundaries[0], 1e-3)
            if net.timing is not None:
                close(both.fine_alpha[i], alone.fine_alpha[0], 1e-5)

@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_noise_and_a_single_frame_are_decoded_without_error(variant):  # C51
    _, net = published(variant)
    width = net.encoder.input_dim
    feats = torch.cat([torch.zeros(1, 30, width), torch.randn(1, 30, width) * 5, torch.randn(1, 30, width)])
    found = net.greedy(feats, torch.tensor([30, 30, 1]))
    assert found.log_probs.isfinite().all() and len(found.boundaries[2]) == found.lens[2] + 1
    assert net.greedy(feats[2:, :1], torch.tensor([1])).lens.tolist() == found.lens[2:].tolist()

@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision_keeps_the_ids(variant, precision):  # C48
    system = kit_system(variant)._replace(precision=precision)
    for name in WAVS:
        wanted = recorded(variant, name)
        found = decode.decode_batch(system, [wanted["feats"]])
        assert torch.equal(found.tokens[0], wanted["ids_raw"]) and found.log_probs.isfinite().all()
    exact = decode.decode_batch(system._replace(precision="float32"), [wanted["feats"]])
    assert not torch.equal(found.log_probs, exact.log_probs)

# ---- checkpoint: published models, training ----

@functools.cache
def training_batch(variant):
    """-> what train_equal.npz records of a batch without padding; forward's arguments, FunASR's draws as order."""
    wanted = recorded(variant, "train_equal")
    draws = [wanted[f"perm{b}"].long() for b in range(4)]  # the positions of each utterance, in the order of their draw
    order = torch.full((4, max(map(len, draws))), torch.inf)
    for row, draw in zip(order, draws):
        row[draw] = torch.arange(len(draw)).float()
    tokens = wanted["text"].clamp(min=0).long()  # padded with -1 there
    return wanted, (wanted["feats"], wanted["feats_lens"].long(), tokens, wanted["text_lens"].long(), order)

@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_every_gradient_norm_equal_funasr(variant):  # C36 C46
    """Recorded: train_equal.npz, with FunASR's permutations handed to the sampler."""
    options, net = published(variant)
    wanted, batch = training_batch(variant)
    net.zero_grad()
    sums, count = net(*batch)
    names = {"loss": "loss", "stat_loss_att": "ce", "stat_loss_pre": "quantity", "stat_loss_pre2": "timing",
             "stat_loss_ctc": "ctc"}
    assert {names[key] for key in wanted if key in names} == set(sums)
    for theirs, ours in names.items():
        if ours in sums:
            torch.testing.assert_close(sums[ours] / count, wanted[theirs].float().squeeze(), rtol=1e-5, atol=1e-5)
    (sums["loss"] / count).backward()
    found = {}
    for name, p in net.named_parameters():
        parts = funasr.funasr_names(name, options.model)
        found |= {part: g.norm().item() for part, g in zip(parts, p.grad.chunk(len(parts)))}
    norms = np.load(kit(variant, "expected/train_equal.npz"))
    assert found == pytest.approx(dict(zip(norms["grad_names"], norms["grad_norms"])), rel=1e-3, abs=1e-5)

@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_both_passes_of_the_decoder_equal_funasr(variant):  # C46
    """Recorded: train_equal.npz; tolerances of its README."""
    options, net = published(variant)
    wanted, (feats, feat_lens, *texts, order) = training_batch(variant)
    hidden, lens, _ = net.encoder(feats, feat_lens)
    alpha = net.predictor(hidden, lens)
    tokens, counts = net.targets(*texts)
    weights = model.scale_weights(alpha, counts)
    close(weights, wanted["alphas"], 1e-4)
    embeds = model.cif(hidden, weights, tokens.shape[1])
    mask = attention.padding_mask(counts, tokens.shape[1])
    close(embeds[mask], wanted["pre_embeds"][mask], 5e-4)
    first, _ = net.decoder(embeds, counts, hidden, lens)
    close(first[mask], wanted["logits_1st"][mask], 2e-4)
    wrong = ((first.argmax(-1) != tokens) & mask).sum(1)
    mixed = model.glance(embeds, net.truth(tokens), counts, wrong, options.model.sampling_ratio, order)
    close(mixed[mask], wanted["sematic_embeds"][mask], 5e-4)
    close(net.decoder(mixed, counts, hidden, lens)[0][mask], wanted["logits"][mask], 2e-4)

SMALL = {"encoder": {"num_layers": 2, "hidden_dim": 16, "num_heads": 2, "ffn_dim": 32, "kernel_size": 5,
                     "dropout": 0.0},
        "decoder": {"num_layers": 2, "hidden_dim": 16, "num_heads": 2, "ffn_dim": 32, "kernel_size": 5, "dropout": 0.0},
        "predictor": {"dropout": 0.0}, "label_smoothing": 0.0}
KINDS = [("sanm", 1, "dense", "sanm", 0), ("sanm", 1, "dense", "sanm", 3),
         ("relative_conformer", 4, "depthwise", "bare", 0)]

@pytest.mark.parametrize("encoder, subsampling, predictor, decoder, upsampling", KINDS)
def test_new_kinds_learn_a_batch_by_heart_from_fresh_weights(encoder, subsampling, predictor, decoder, upsampling):
    torch.manual_seed(0)
    values = {**SMALL, "encoder": {**SMALL["encoder"], "kind": encoder, "subsampling": subsampling},
              "predictor": {"kind": predictor, "upsampling": upsampling, "tail": 0.45, "dropout": 0.0},
              "decoder": {**SMALL["decoder"], "kind": decoder}, "end_token": True}
    net = checkpoint.build(config.from_dict({"model": values}, "test").model, 20, 12)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    feats, lens = torch.randn(4, 20 * subsampling, 20), torch.tensor([20, 18, 16, 12]) * subsampling
    tokens, token_lens = torch.randint(4, 12, (4, 6)), torch.tensor([6, 5, 4, 3])
    for _ in range(45):
        sums, count = net(feats, lens, tokens, token_lens)
        optimizer.zero_grad()
        (sums["loss"] / count).backward()
        optimizer.step()
    assert sums["ce"] / count < 0.1
    found = net.eval().greedy(feats, lens)
    for i, n in enumerate(token_lens.tolist()):
        assert found.tokens[i, :found.lens[i]].tolist() == [*tokens[i, :n].tolist(), EOS]
    order = torch.rand(4, 7)  # of the six tokens and the end
    narrow = net.train()(feats, lens, tokens, token_lens, order)[0]
    wide = net.double()(feats.double(), lens, tokens, token_lens, order)[0]
    torch.testing.assert_close(wide["loss"].float(), narrow["loss"], rtol=1e-3, atol=1e-3)
    assert torch.equal(net.eval().greedy(feats.double(), lens).tokens, found.tokens)

# ---- checkpoint: loading ----

def test_weights_are_copied_unless_they_are_to_be_adopted():
    for options, is_shared in (({}, False), ({"adopt": True}, True)):
        linear, given = nn.Linear(2, 2), nn.Linear(2, 2).state_dict()
        files.load_weights(linear, given, "x", **options)
        assert torch.equal(linear.weight, given["weight"])
        assert (linear.weight.data_ptr() == given["weight"].data_ptr()) == is_shared

@pytest.mark.parametrize("version", [1, 2])
def test_a_checkpoint_whose_config_holds_a_field_of_an_earlier_version_loads(tmp_path, ckpt, version):
    state = torch.load(ckpt, weights_only=True)
    state["config"]["model"]["predictor"]["firing"] = "delay"
    state["config"]["model"]["padding_leaks"] = True
    torch.save({**state, "format": version}, tmp_path / "old.pt")
    assert checkpoint.load_parts(tmp_path / "old.pt").config == checkpoint.load_parts(ckpt).config
    state["config"]["model"]["firing"] = "delay"  # not there
    torch.save(state, tmp_path / "odd.pt")
    refused("unknown key 'model.firing'", checkpoint.load_parts, tmp_path / "odd.pt")

def test_the_device_is_a_gpu_where_there_is_one_unless_another_is_asked_for(monkeypatch):
    for has_gpu, found in ((True, ("cuda", "cuda", "cpu")), (False, ("cpu", "", "cpu"))):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
        for name, device in zip(("auto", "cuda", "cpu"), found):
            with contextlib.nullcontext() if device else pytest.raises(ValueError, match="torch finds no GPU"):
                assert checkpoint.pick_device(name).type == device

def test_a_size_above_10_000_must_be_one_that_the_weights_have():
    wide = {"a": torch.zeros(1, 10_001)}
    for size, weights, is_refused in ((10_000, {}, False), (10_001, {}, True), (10_001, wide, False)):
        options = config.from_dict(config.nested("model.encoder.ffn_dim", size), "test")
        with pytest.raises(ValueError, match="at most 10000, got 10001") if is_refused else contextlib.nullcontext():
            checkpoint.check_sizes(options, weights, "x.pt")

def test_the_normalisation_is_measured_on_a_bounded_number_of_utterances(monkeypatch):
    seen = []
    monkeypatch.setattr(checkpoint, "compute_stats", lambda feats: seen.append(len(list(feats))) or torch.ones(2, 80))
    assert checkpoint.STATS_UTTERANCES == 500
    monkeypatch.setattr(checkpoint, "STATS_UTTERANCES", 4)
    for count in (1, 4, 5, 7, 8, 9):
        checkpoint.fresh(config.Config(data=config.DataConfig(toy=config.ToyConfig(num_train=count))))
    assert seen == [1, 4, 3, 4, 4, 3]

@pytest.mark.parametrize("wrapper", ["", "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix, zipped", [("", True), ("module.", True), ("", False)])
def test_wrapped_prefixed_and_old_files_load(tmp_path, wrapper, prefix, zipped):  # C40
    _, net = published("sanm")
    state = {prefix + name: x for name, x in torch.load(kit("sanm/model.pt"), weights_only=True).items()}
    state = {wrapper: state, "optimizer": {"step": 1}} if wrapper else state
    shutil.copytree(kit("sanm"), tmp_path, dirs_exist_ok=True)
    torch.save(state, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    loaded = checkpoint.load_directory(tmp_path).model.state_dict()
    assert all(torch.equal(x, loaded[name]) for name, x in net.state_dict().items())

@pytest.mark.parametrize("content, words", [(b"", "what torch cannot load"), (b"PK\3\4", "what torch cannot load"),
                                            (None, "no such file")])
def test_a_file_that_is_no_weights_is_one_line(tmp_path, content, words):  # C40
    if content is not None:
        (tmp_path / "model.pt").write_bytes(content)
    refused(rf"model\.pt: wanted [^\n]*{words}[^\n]*\Z", funasr.read_weights, tmp_path / "model.pt")

@pytest.mark.parametrize("name, tensors, parameters", [
    ("paraformer", 956, 220_084_533), ("bicif", 968, 225_074_998), ("seaco", 1095, 247_339_018),
    ("contextual", 970, 228_064_565)])
def test_published_models_have_the_sizes_that_they_are_said_to_have(name, tensors, parameters):  # C49
    """By the shapes of shared/FUNASR.md, 1.1, and shared/FUNASR_MORE.md, 1; sizes: downloads.DOWNLOADS."""
    options = rules.load(str(HERE / "configs/paraformer_large.yaml"))
    section, second = options.model, replace(options.model.decoder, num_layers=6, kernel_size=21, ffn_dim=1024)
    if name in ("bicif", "seaco"):
        section = replace(section, predictor=replace(section.predictor, upsampling=3))
    if name != "bicif":
        section = replace(section, name=name)
    if name == "seaco":
        section = replace(section, hotwords=config.HotwordConfig(decoder=second))
    with torch.device("meta"):
        net = checkpoint.build(section, audio.feature_dim(options.data), 8404)
    assert (len(net.state_dict()), sum(p.numel() for p in net.parameters())) == (tensors, parameters)
    size = sum(x.nbytes for x in net.state_dict().values()) / 1e6
    assert any(abs(model.megabytes - size) < 1 for model in downloads.DOWNLOADS)

# ---- checkpoint: weights laid out for recognition ----

CAN_INT8 = pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason="this processor has no products of int8")

@CAN_INT8
@pytest.mark.parametrize("bias", [True, False])
def test_an_int8_layer_is_the_product_of_its_levels_and_no_row_depends_on_another(bias):  # C140
    """By hand: inputs in 127 steps from their row's least, at most 0, to its most, at least 0; weights in 127."""
    layer = fresh(0, lambda: nn.Linear(48, 40, bias=bias)).float()
    x = normal(1, 3, 7, 48).float() * torch.logspace(-3, 3, 7)[:, None]
    x[1] = F.relu(x[1])
    step = layer.weight.detach().abs().amax(1, keepdim=True) / 127
    weight = (layer.weight.detach() / step).round() * step
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    unit = (high - low).clamp(min=1e-12) / 127
    wanted = F.linear(((x - low) / unit).round() * unit + low, weight, layer.bias)
    found, alone = (packed.Int8Linear(layer)(part) for part in (x, x[1:2, 3:4]))
    nothing = packed.Int8Linear(layer)(torch.zeros(1, 48))
    assert_same(nothing[0], torch.zeros(40) if layer.bias is None else layer.bias.detach())
    scale = layer(x).detach().abs().amax(-1, keepdim=True)
    assert ((found - wanted) / scale).abs().max() < 0.01  # where a level lies half way, rounding may differ
    assert ((found - wanted) / scale).abs().median() < 1e-5
    assert torch.equal(alone[0, 0], found[1, 3])
    assert ((found - layer(x)) / scale).abs().max() < 0.03

@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_weights_laid_out_keep_every_id_in_float32_and_nearly_all_in_int8(variant, monkeypatch):  # C140
    """int8 with the float32 count of tokens, where the two best are 0.1 apart. The kits' random weights are harsh: with
    8 bits for the weights alone 97% of all 262 tokens are kept. Their matrices are laid out here only."""
    monkeypatch.setattr("packed.LARGE", 0)
    exact, ordered = (checkpoint.load_system(kit(variant), "cpu", laid_out=laid_out) for laid_out in (False, True))
    small = checkpoint.load_system(kit(variant), "cpu", "int8")
    assert any(isinstance(layer, packed.PackedLinear) for layer in ordered.model.modules())
    assert ordered.model.embedding.weight.is_meta and not exact.model.embedding.weight.is_meta  # the sampler's
    clear, kept = 0, 0
    for name in WAVS:
        wanted = recorded(variant, name)
        found = decode.decode_batch(ordered, [wanted["feats"]])
        assert torch.equal(found.tokens[0], wanted["ids_raw"])
        count, both = found.lens, []
        for system in (exact, small):
            hidden, lens = system.model.encode(wanted["feats"][None], ints(len(wanted["feats"])))
            weights = scale_weights(system.model.predictor(hidden, lens), count)
            logits, _ = system.model.decoder(cif(hidden, weights, int(count)), count, hidden, lens)
            both.append(logits[0])
        best = both[0].topk(2).values
        sure = best[:, 0] - best[:, 1] > 0.1
        clear, kept = clear + int(sure.sum()), kept + int((both[0].argmax(-1) == both[1].argmax(-1))[sure].sum())
    assert small.precision == "float32" or kept >= 0.86 * clear > 0

def test_only_large_matrices_are_laid_out_and_where_int8_finds_none_a_warning_says_so(ckpt, capsys):  # C140
    net = nn.ModuleDict({"a": nn.Linear(512, 512), "b": nn.Linear(512, 511), "ctc": nn.Linear(512, 600),
                         "c": nn.Sequential(nn.Linear(256, 1024))})
    assert packed.lay_out(net, lambda linear: nn.Identity()) == 2
    assert [type(layer).__name__ for layer in (net["a"], net["b"], net["ctc"], net["c"][0])] == [
        "Identity", "Linear", "Linear", "Identity"]
    assert packed.lay_out(net, packed.PackedLinear) == 1 and isinstance(net["ctc"], packed.PackedLinear)  # in float32
    in_no_file = torch.ones(2**20)
    packed.release([in_no_file, torch.ones(3)])
    assert in_no_file.all()
    warning = "warning: no matrix of this model is large enough for int8 to pay; going on in float32\n"
    for precision, said in (("int8", warning), ("float32", "")):
        if checkpoint.runs_on(precision, torch.device("cpu")):
            assert checkpoint.load_system(ckpt, "cpu", precision, laid_out=True).precision == "float32"
            assert capsys.readouterr().err == said

@CAN_INT8
@pytest.mark.parametrize("variant", VARIANTS)
def test_int8_weights_on_disk_give_what_int8_made_on_loading_gives(variant, tmp_path, monkeypatch):  # C140
    monkeypatch.setattr("packed.LARGE", 0)
    place = tmp_path / "small"
    assert decode.main(["--ckpt", str(kit(variant)), "--export", str(place), "--dtype=int8"]) == 0
    ours, theirs = (checkpoint.load_system(path, "cpu", "int8") for path in (place, kit(variant)))
    for name in WAVS:
        found, wanted = (decode.decode_batch(system, [recorded(variant, name)["feats"]]) for system in (ours, theirs))
        assert torch.equal(found.tokens, wanted.tokens) and torch.equal(found.log_probs, wanted.log_probs)

@CAN_INT8
def test_int8_weights_run_in_int8_only_and_load_strictly(tmp_path, monkeypatch, capsys):  # C140
    monkeypatch.setattr("packed.LARGE", 0)
    place = tmp_path / "small.pt"
    said = checkpoint.export_int8(str(kit("sanm")), str(place))
    assert said == f"{place}: a checkpoint in int8"
    assert refusal(capsys, "--ckpt", place) == (
        f"decode.py: {place}: wanted --dtype int8, as its weights are in int8, got float32\n")
    with pytest.raises(ValueError, match="wanted weights in float32 to make int8 of, got .*small.pt, which is in int8"):
        checkpoint.export_int8(str(place), "x")
    with pytest.raises(ValueError, match="small.pt: wanted weights in float32, got int8, which cannot learn"):
        run = replace(config.Config(), training=config.TrainingConfig(init_from=str(place)),
                      data=config.DataConfig(kind="manifest", train="x"))
        checkpoint.start_from(checkpoint.adopted(run))
    state = torch.load(place, weights_only=True)
    weights = state["model"]
    del weights["decoder.output.rows"]
    weights["decoder.blocks.0.feed_forward.up.weight"] = weights["decoder.blocks.0.feed_forward.up.weight"].float()
    torch.save(state, place)
    older = tmp_path / "older.pt"
    torch.save({**state, "model": {**weights, "decoder.output.sums": torch.ones(1)}}, older)
    with pytest.raises(ValueError, match="older.pt: wanted int8 weights as this version .*export the model again"):
        checkpoint.load_system(older, "cpu", "int8")
    with pytest.raises(ValueError, match="missing decoder.output.rows; decoder.blocks.0.feed_forward.up.weight "
                                         "torch.float32, wanted torch.int8$"):
        checkpoint.load_system(place, "cpu", "int8")

MEASURE_PEAK = """
import re, checkpoint
def in_mb(field):
    return int(re.search(field + r":\\s*(\\d+)", open("/proc/self/status").read())[1]) / 1000
open("/proc/self/clear_refs", "w").write("5")       # the peak begins anew
before = in_mb("VmRSS")
system = checkpoint.load_system(order["argv"][0], "cpu", "int8")
print(in_mb("VmHWM") - before, in_mb("VmRSS") - before)
sys.exit()
"""

@CAN_INT8
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read as Linux gives it")
def test_loading_for_int8_takes_the_memory_that_is_held_and_a_layer(zygote, tmp_path):  # C140
    """130 MB of weights, and the same in int8, of which the first layer stays in float32: 1.3 times what is held, and
    the largest matrix, which weighs more here than in a model of 50 layers."""
    sizes = config.EncoderConfig(kind="sanm", num_layers=6, hidden_dim=512, num_heads=4, ffn_dim=4096, subsampling=1)
    options = replace(config.Config(), model=replace(config.ModelConfig(), encoder=sizes))
    words = Tokenizer.build(["a b"], "word")
    net = checkpoint.build(options.model, 80, len(words))
    system = checkpoint.System(options, words, torch.tensor([[0.0], [1.0]]).repeat(1, 80), net)
    checkpoint.export(system, str(tmp_path / "large.pt"))
    checkpoint.export_int8(str(tmp_path / "large.pt"), str(tmp_path / "small.pt"))
    for name in ("large.pt", "small.pt"):
        said = zygote.run(tmp_path / "said", tmp_path / name, first=MEASURE_PEAK)
        peak, held = map(float, said.split())
        assert peak <= 1.3 * held + 9, name

def test_a_precision_that_the_processor_lacks_becomes_float32_with_a_warning(ckpt, monkeypatch, capsys):  # C141
    for check in ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_amx_fp16_supported",
                  "_is_avx2_supported"):
        monkeypatch.setattr(torch.cpu, check, lambda: False)
    for precision in ("bfloat16", "float16", "int8"):
        assert checkpoint.load_system(ckpt, "cpu", precision).precision == "float32"
        assert capsys.readouterr().err == f"warning: this cpu has no {precision} products; going on in float32\n"
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert checkpoint.load_system(ckpt, "cpu", "bfloat16").precision == "bfloat16" and not capsys.readouterr().err
    for able in (False, True):  # a GPU before Ampere emulates bfloat16
        monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                            lambda including_emulation=True: including_emulation or able)
        assert [checkpoint.runs_on(precision, torch.device("cuda")) for precision in checkpoint.PRECISIONS] == [
            True, able, True, False]

# ---- train: decisions ----

@pytest.mark.parametrize("schedule, steps", [
    ("cosine", {0: 0.1, 9: 1.0, 10: 1.0, 60: 0.6, 110: 0.2, 500: 0.2}),
    ("inverse_sqrt", {0: 0.1, 9: 1.0, 39: 0.5, 89: 1 / 3}),
    ("constant", {0: 0.1, 9: 1.0, 500: 1.0})])
def test_learning_rate_follows_its_closed_form(schedule, steps):
    options = config.TrainingConfig(learning_rate=1.0, warmup_steps=10, schedule=schedule, final_lr_ratio=0.2)
    for step, wanted in steps.items():
        assert train.learning_rate(step, 110, options) == pytest.approx(wanted)
    if schedule == "cosine":
        assert train.learning_rate(11, 11, options) == pytest.approx(0.2)
    if schedule == "inverse_sqrt":
        assert train.learning_rate(3, 110, replace(options, warmup_steps=0)) == pytest.approx(0.5)

@pytest.mark.parametrize("steps, warmup, averaged", [(14, 1, 1.0), (16, 2, 1.0), (20, 2, 1.0), (30, 3, 1.5)])
def test_shares_of_a_run_are_rounded_and_an_average_is_over_one_step_or_more(steps, warmup, averaged):
    found = train.in_steps(config.TrainingConfig(warmup_share=0.1, average_share=0.05), steps)
    assert (found.warmup_steps, found.average_decay) == (warmup, pytest.approx(1 - 1 / averaged))

def scores(*pairs):
    return [{"token_accuracy": token, "sequence_accuracy": sequence} for token, sequence in pairs]

@pytest.mark.parametrize("history, best", [
    (scores((0.5, 0.1)), True), (scores((0.5, 0.1), (0.6, 0.0)), True), (scores((0.5, 0.1), (0.5, 0.1)), True),
    (scores((0.5, 0.1), (0.5, 0.2)), True), (scores((0.9, 0.1), (0.5, 0.1), (0.8, 0.9)), False)])
def test_best_is_the_highest_token_accuracy_then_sequence_accuracy_then_the_latest(history, best):
    assert (train.best_row(history) is history[-1]) is best

@pytest.mark.parametrize("history, changes, word", [
    ([], {}, ""), (scores((0.9, 0.9)), {}, ""), (scores(*[(0.9, 0.9)] * 5), {}, "epochs done"),
    (scores((0.95, 0.9)), {"target_token_accuracy": 0.95, "target_sequence_accuracy": 0.85}, "target"),
    (scores((0.95, 0.8)), {"target_token_accuracy": 0.95, "target_sequence_accuracy": 0.85}, ""),
    (scores((0.9, 0.85)), {"target_sequence_accuracy": 0.85}, "target"), (scores((1.0, 1.0)), {}, ""),
    (scores((0.95, 0.0)), {"target_token_accuracy": 0.95}, "target"),
    (scores((0.5, 0.5), (0.4, 0.5), (0.4, 0.5)), {"patience": 2}, "no improvement"),
    (scores((0.5, 0.5), (0.5, 0.5), (0.5, 0.5)), {"patience": 2}, "no improvement"),
    (scores((0.5, 0.5), (0.6, 0.5), (0.4, 0.5)), {"patience": 2}, "")])
def test_a_run_stops_at_its_target_without_improvement_or_at_its_end(history, changes, word):
    reason = train.stop_reason(history, config.TrainingConfig(num_epochs=5, **changes))
    assert word in reason and bool(word) == bool(reason)

# ---- train: one step ----

SIZES = "num_layers: 1\n    hidden_dim: 16\n    num_heads: 2\n    ffn_dim: 16"
TINY = f"""
model:
  encoder:
    {SIZES}
    subsampling: 2
  decoder:
    {SIZES}
  predictor:
    hidden_dim: 16
training:
  batch_size: 4
  num_epochs: 3
  warmup_steps: 2
  device: cpu
data:
  num_mels: 8
  toy:
    num_train: 20
    num_dev: 6
    num_symbols: 4
    min_symbols: 2
    max_symbols: 3
"""

def tiny_yaml(path: Path) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(TINY)
    return str(path)

def trained(folder: Path, *options: str, code: int = 0) -> Path:
    """What TINY with these options leaves: the newest run in folder/runs."""
    assert train.main([tiny_yaml(folder / "tiny.yaml"), "--runs", str(folder / "runs"), *options]) == code
    return run_of(folder / "runs")

def run_of(folder: Path) -> Path:
    return (folder / "latest").resolve()

def tiny_batch(count: int = 3) -> data.Batch:
    options = config.DataConfig(num_mels=8, toy=config.ToyConfig(num_symbols=4, min_symbols=2, max_symbols=3))
    dataset = data.ToySeq2SeqDataset(count, options, lambda text: [4 + ord(c) - ord("a") for c in text])
    return data.collate([dataset[i] for i in range(count)])

def tiny_model(**options) -> torch.nn.Module:
    torch.manual_seed(0)
    return build(replace(config.from_dict(config.parse_yaml(TINY), "tiny").model, **options), 8, 8)

def test_a_step_is_adamw_on_the_clipped_mean_gradient_with_decay_on_matrices_only():  # C111
    """Beside a plain loop, whose state ours takes over before the last step. The third step has one token in all."""
    ours, theirs, batch = tiny_model().double().eval(), tiny_model().double().eval(), tiny_batch()
    parameters = list(theirs.parameters())
    moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in parameters}
    optimizer = train.make_optimizer(ours, 0.3)
    for number, rate in enumerate((0.1, 0.03, 0.2, 0.01)):
        most = 1e3 if number == 1 else 0.5  # a gradient below it stays
        options = config.TrainingConfig(max_grad_norm=most, weight_decay=0.3)
        if number == 2:
            batch = batch._replace(token_lens=ints(1, 0, 0))
        if number == 3:
            optimizer, steps = train.make_optimizer(ours, 0.3), torch.tensor(3.0)
            in_groups = [p for p in parameters if p.dim() > 1] + [p for p in parameters if p.dim() < 2]
            states = [{"step": steps, "exp_avg": moments[p][0], "exp_avg_sq": moments[p][1]} for p in in_groups]
            train.load_optimizer(optimizer, {"state": dict(enumerate(states))})
        step = train.train_step(ours, optimizer, batch, rate, options, number)
        sums, tokens = theirs(*train.inputs(batch, theirs), *sampler_order(theirs, batch, 0, number))
        theirs.zero_grad()
        (sums["loss"] / tokens).backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), most).item()
        with torch.no_grad():
            for p, (mean, square) in moments.items():
                mean.lerp_(p.grad, 0.1)
                square.lerp_(p.grad ** 2, 0.02)
                hat, deviation = mean / (1 - 0.9 ** (number + 1)), (square / (1 - 0.98 ** (number + 1))).sqrt()
                p *= 1 - rate * (0.3 if p.dim() > 1 else 0.0)
                p -= rate * hat / (deviation + 1e-8)
        assert step.grad_norm == pytest.approx(norm) and norm > 0.5 and train.num_updates(optimizer) == number + 1
        assert (step.tokens, step.finite) == (int(batch.token_lens.sum()), True)
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9, msg=f"step {number}: {name}")

def test_a_run_has_the_threads_that_are_asked_for_and_augments_what_it_learns_from_alone(tmp_path):
    threads = torch.get_num_threads() + 2
    run = train.make_run(rules.load(tiny_yaml(tmp_path / "tiny.yaml"), [f"--training.threads={threads}"]))
    assert torch.get_num_threads() == threads
    assert run.train_set.augment and not run.dev_set.augment

def test_the_moving_average_is_the_closed_form_once_grown():
    value = 5.0
    for n in range(200):
        value += train.newest_share(n, 0.9) * (n - value)
    wanted = sum(0.1 * 0.9 ** (199 - n) * n for n in range(200))  # the weight of the young steps has died out
    assert value == pytest.approx(wanted, rel=1e-4)
    assert [train.newest_share(n, 0.9) for n in (0, 1, 500)] == pytest.approx([1.0, 1 - 2 / 11, 0.1])

def test_dropout_is_drawn_by_the_number_of_the_step():
    model = tiny_model().train()
    optimizer = train.make_optimizer(model, 0.0)
    steps = [train.train_step(model, optimizer, tiny_batch(), 0.0, config.TrainingConfig(), n) for n in (3, 3, 4)]
    once, again, later = (step.sums["quantity"] for step in steps)
    assert once == again != later

@pytest.mark.parametrize("precision, wanted", [("bfloat16", True), ("auto", False), ("float32", False)])
def test_a_step_on_a_cpu_is_in_bfloat16_where_that_is_asked_for_only(monkeypatch, precision, wanted):
    found = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)    # of a GPU beside it
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype, enabled: found.append((kind, dtype, enabled))
                        or contextlib.nullcontext())
    net, options = tiny_model(), config.TrainingConfig(precision=precision, accumulate=2)
    train.train_step(net, train.make_optimizer(net, 0.0), tiny_batch(), 0.1, options)
    assert found == [("cpu", torch.bfloat16, wanted)] * 2

def broken_batch() -> data.Batch:
    batch = tiny_batch()
    batch.feats[0, 0, 0] = math.nan
    return batch

@pytest.mark.parametrize("fault", ["features", "loss", "gradient", "no utterance"])
def test_a_step_that_is_not_finite_or_has_no_utterance_changes_nothing_and_says_so(fault):  # C19 C31
    model, batch = tiny_model(), broken_batch() if fault == "features" else tiny_batch()
    if fault == "loss":
        model.register_forward_hook(lambda module, given, out: ({**out[0], "loss": out[0]["loss"] + math.inf}, out[1]))
    if fault == "gradient":
        model.decoder.output.bias.register_hook(lambda gradient: gradient * math.nan)
    if fault == "no utterance":
        batch = data.collate([data.Skip("a", "broken")])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = train.make_optimizer(model, 0.01)
    step = train.train_step(model, optimizer, batch, 0.1, config.TrainingConfig())
    assert step == train.Step({}, 0, 0.0, fault == "no utterance") and not train.num_updates(optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not [name for name in train.step_totals(step, batch, 1.0, 0.5) if name.startswith("loss")]

def test_a_step_that_is_skipped_leaves_the_moving_average_as_it_is(tmp_path):
    path = tiny_yaml(tmp_path / "tiny.yaml")
    run = train.make_run(rules.load(path, ["--training.average_decay=0.5"]))._replace(folder=tmp_path)
    torch.manual_seed(1)
    for x in run.average.parameters():
        x.data.normal_()  # far from the weights, so that any step towards them shows
    before = {name: value.clone() for name, value in run.average.state_dict().items()}
    for batch in (broken_batch(), tiny_batch()):
        step = train.take_step(run, batch, 0, 10)
        is_kept = all(torch.equal(value, before[name]) for name, value in run.average.state_dict().items())
        assert is_kept is not step.finite
    named = f"batch: {' '.join(tiny_batch().keys)}\n"
    assert (tmp_path / "train.log").read_text() == f"step 1: loss or gradient not finite, skipped; {named}"
    averages, weights = list(run.average.parameters()), list(run.model.parameters())
    torch.testing.assert_close(averages, weights)  # whole after the first update, and after the second 9/11 of it
    before = [x.detach().clone() for x in averages]
    train.take_step(run, tiny_batch(), 1, 10)
    torch.testing.assert_close(averages, [x.lerp(new, 9 / 11) for x, new in zip(before, weights)])
    assert not torch.equal(averages[0], weights[0])

@pytest.mark.parametrize("is_terminal, tick, shown", [
    (False, 3.0, "35"), (False, 3.1, "24"), (True, 0.039, "35"), (True, 0.0425, "24")])
def test_steps_are_timed_and_shown_now_and_then(is_terminal, tick, shown, tmp_path, monkeypatch, capsys):
    """The clock is read once before the steps and three times in each: wait, step, checkpoint."""
    ticks, saved = itertools.count(), []
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: tick * next(ticks)))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    monkeypatch.setattr(train, "save", lambda run, progress: saved.append(progress.step))
    run = train.make_run(rules.load(tiny_yaml(tmp_path / "tiny.yaml"), ["--training.checkpoint_steps=2"]))
    progress = train.train_epoch(run._replace(folder=tmp_path, stop=threading.Event()), train.Progress(step=5), 15)
    assert re.findall("step (.)/5", capsys.readouterr().out) == list(shown)
    assert progress.totals["seconds"] == pytest.approx(10 * tick) and progress.totals["wait"] == pytest.approx(5 * tick)
    assert (progress.batch, progress.step, saved) == (5, 10, [6, 8, 10])

@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read as Linux gives it")
def test_peak_memory_is_in_mib(monkeypatch):
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
    assert train.peak_memory_mb(torch.device("cpu")) == pytest.approx(peak, rel=0.05)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 1024 * 1024)
    assert train.peak_memory_mb(torch.device("cuda")) == 3
    monkeypatch.setattr(train.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=5 * 1024 * 1024))
    for platform, wanted in (("darwin", 5), ("linux", 5 * 1024)):
        monkeypatch.setattr(sys, "platform", platform)
        assert train.peak_memory_mb(torch.device("cpu")) == wanted

def test_the_figures_of_an_epoch_are_sums_divided_once():  # C24
    """Two steps, of 3 tokens and of 1, and one that was skipped."""
    steps = (train.Step({"loss": 6.0, "ce": 3.0}, 3, 1.0, True), train.Step({"loss": 2.0, "ce": 5.0}, 1, 3.0, True),
             train.Step({}, 0, 0.0, False))
    totals, batch = {}, tiny_batch()
    for step in steps:
        totals = ranks.sum_by_name(totals, train.step_totals(step, batch, seconds=2.0, wait=0.5))
    row = train.epoch_row(train.Progress(), totals, 1e-3, {}, 9.0, 1.0)
    lens = batch.feat_lens.double()
    wanted = {"loss": 2.0, "loss_ce": 2.0, "grad_norm": 2.0, "skipped_steps": 1, "data_wait": 0.25, "utterances": 9,
              "frames_per_second": lens.sum().item() / 2, "padding": 1 - (lens.mean() / lens.max()).item()}
    assert {name: row[name] for name in wanted} == pytest.approx(wanted)
    row = train.epoch_row(train.Progress(1), train.step_totals(steps[1], batch, 2.0, 0.5), 1e-3, {}, 9.0, 1.0)
    assert (row["epoch"], row["loss"], row["grad_norm"]) == (2, 2.0, 3.0)   # of one token
    assert train.Progress() == (0, 0, 0, 0, {}, ())

def test_every_rank_tells_of_its_own_data_and_the_first_of_everything(tmp_path, monkeypatch, capsys):
    run, batches = SimpleNamespace(folder=tmp_path), [data.collate([data.Skip("a", "broken")])]
    for rank in (0, 1):
        monkeypatch.setattr(train, "own_rank", lambda: rank)
        assert list(train.log_skips(run, batches)) == batches
        train.say(run, "an epoch")
    assert capsys.readouterr().out == "skipped a: broken\nan epoch\nrank 1: skipped a: broken\n"
    assert (tmp_path / "train.log").read_text() == "skipped a: broken\nan epoch\n"

@pytest.mark.parametrize("step, done, line", [
    (train.Step({"loss": 6.0}, 3, 1.0, True), 9, "epoch 2/3  step 4/5  loss 2.000  50 frames/s  left 0:00:12"),
    (train.Step({"loss": 6.0}, 1, 1.0, True), 16, "epoch 2/3  step 4/5  loss 6.000  50 frames/s  left 0:00:00"),
    (train.Step({}, 0, 0.0, False), 15, "epoch 2/3  step 4/5  loss 0.000  50 frames/s  left 0:00:00")])
def test_a_terminal_is_told_loss_speed_and_the_time_that_is_left(step, done, line):
    progress = train.Progress(epoch=1, batch=4, step=done, totals={"seconds": 8.0, "frames": 400.0})
    assert train.progress_line(progress, step, 5, 15, 3) == line

def test_evaluation_counts_a_planted_set_by_alignment():  # C11
    tokenizer = Tokenizer.build(["a b"])
    refs, hyps = ["ab ab", "a", "b"], ["ab aab", "a", ""]

    class Planted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, feats, feat_lens, tokens, token_lens):
            n = token_lens.sum()
            return {"loss": 3.0 * n, "ce": n, "ctc": torch.tensor(math.inf)}, n

        def greedy(self, feats, feat_lens):
            ids = [torch.tensor(tokenizer.encode(h), dtype=torch.int64) for h in hyps]
            tokens = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
            return Hypotheses(tokens, torch.tensor([len(i) for i in ids]), tokens * 0.0, [], tokens * 0.0, [])

    items = [data.Utterance(r, torch.zeros(4, 8), torch.tensor(tokenizer.encode(r)), r, None, 1.0) for r in refs]
    batch = data.collate([*items, data.Skip("d", "empty")])
    sums = train.evaluate(Planted(), [batch], tokenizer.decode)
    assert train.dev_figures({**sums, "dev_counted": 1})["dev_loss"] == 7 * 3.0     # of a set with one token
    assert train.dev_figures(sums) == {
        "token_accuracy": pytest.approx(1 - 2 / 7), "sequence_accuracy": pytest.approx(1 / 3),
        "length_accuracy": pytest.approx(1 / 3), "cer": pytest.approx(2 / 7), "wer": pytest.approx(2 / 4),
        "dev_utterances": 3, "dev_skipped": 1, "dev_loss": 3.0, "dev_loss_ce": 1.0}     # not the infinite one

@pytest.mark.parametrize("mwer_weight", [0.0, 0.5])  # whose expected errors are drawn, so they only repeat
def test_dev_losses_are_those_of_each_utterance_alone_and_leave_the_generator_as_it_is(mwer_weight):  # C28
    net, batch = tiny_model(ctc_weight=0.3, mwer_weight=mwer_weight).eval(), tiny_batch()
    before = torch.get_rng_state()
    found = dev_losses(net, batch)
    assert torch.equal(torch.get_rng_state(), before) and dev_losses(net, batch) == found
    assert found["dev_counted"] == int(batch.token_lens.sum())
    alone = collections.Counter()
    for part in split_batch(batch, 3):
        losses, _ = net(*train.inputs(part, net), *sampler_order(net, part, 0, 0))
        alone.update({name: value.item() for name, value in losses.items()})
    for name in ("ce", "quantity", "ctc"):
        assert found[f"dev_loss_{name}"] == pytest.approx(alone[name], rel=1e-5)
    if not mwer_weight:
        assert found["dev_loss"] == pytest.approx(alone["loss"], rel=1e-5)

def test_the_sampler_draws_for_an_utterance_the_same_in_every_batch():  # C87
    paraformer, batch = tiny_model(), tiny_batch(3)
    order, = sampler_order(paraformer, batch, 5, 9)
    for k, part in enumerate(split_batch(batch, 3)):
        n = int(batch.token_lens[k])
        assert part.keys == [batch.keys[k]] and part.feats.shape[1] == batch.feat_lens[k]
        assert torch.equal(sampler_order(paraformer, part, 5, 9)[0][0], order[k, :n])
    assert not torch.equal(order, sampler_order(paraformer, batch, 5, 10)[0])

# ---- train: a run ----

TIMES = ("seconds", "frames_per_second", "data_wait", "peak_memory_mb")

def without_times(history):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in history]

def history_of(run: Path) -> list[dict]:
    return json.loads((run / "metrics.json").read_text())

def test_a_run_leaves_its_config_log_metrics_curves_and_checkpoints(tmp_path):  # C28 C29
    run = trained(tmp_path, "--training.num_epochs=2")
    assert rules.load(str(run / "config.yaml")) == rules.load(tmp_path / "tiny.yaml", ["--training.num_epochs=2"])
    history = history_of(run)
    rows = list(csv.DictReader((run / "results.csv").read_text().splitlines()))
    assert [{k: float(v) for k, v in row.items()} for row in rows] == history and len(history) == 2
    wanted = {"epoch", "step", "learning_rate", "loss", "loss_ce", "loss_quantity", "grad_norm", "token_accuracy",
              "sequence_accuracy", "length_accuracy", "cer", "wer", "frames_per_second", "padding",
              "skipped_utterances", "skipped_steps", "data_wait", "peak_memory_mb", "dev_skipped"}
    assert wanted <= set(history[0])
    options = rules.load(str(run / "config.yaml")).training
    assert [row["learning_rate"] for row in history] == [train.learning_rate(n, 10, options) for n in (4, 9)]
    log, count = (run / "train.log").read_text(), sum(p.numel() for p in tiny_model().parameters())
    assert f"{run}: paraformer, {count / 1e6:.2f} M parameters, 20 utterances, 8 symbols, on cpu\n" in log
    assert log.count("epoch 1/2") == 1
    state = read_checkpoint(run / "checkpoints/latest.pt")
    assert config.from_dict(state["config"], "checkpoint") == rules.load(str(run / "config.yaml"))
    assert state["history"] == history and state["progress"]["epoch"] == 2
    best = read_checkpoint(run / "checkpoints/best.pt")
    assert best["progress"]["epoch"] == len(best["history"]) == train.best_row(history)["epoch"]
    assert set(state) == {"format", "config", "tokenizer", "stats", "model", "trained", "optimizer",
                          "progress", "history", "log_bytes", "utterances"}
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "train.log", "metrics.json", "results.csv", "curves.svg", "checkpoints", "lock"}

def failing_step(monkeypatch, first: int, fail) -> None:
    """From step `first` on, counted from 0, fail(batch) comes before train_step."""
    real, count = train.train_step, itertools.count()

    def step(model, optimizer, batch, *rest):
        if next(count) >= first:
            fail(batch)
        return real(model, optimizer, batch, *rest)
    monkeypatch.setattr(train, "train_step", step)

def raising(error: Exception):
    def fail(*_, **__):
        raise error
    return fail

def test_two_runs_of_one_second_have_folders_of_their_own_and_latest_is_the_second(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda form: "20260101_000000")
    first, second = train.new_run(tmp_path, "x"), train.new_run(tmp_path, "x")
    train.point_latest(first)
    train.point_latest(second)
    assert (first.name, second.name) == ("20260101_000000_x", "20260101_000000_x_2")
    assert (tmp_path / "latest").resolve() == second.resolve()
    assert sorted(p.name for p in tmp_path.iterdir()) == [first.name, second.name, "latest"]

def test_a_folder_in_the_place_of_latest_is_refused_and_nothing_is_left_beside_it(tmp_path, capsys):
    (tmp_path / "runs/latest").mkdir(parents=True)
    trained(tmp_path, code=2)
    assert capsys.readouterr().err.startswith(f"train.py: {tmp_path / 'runs/latest'}: wanted a link")
    assert os.listdir(tmp_path / "runs") == ["latest"]

def test_a_recording_that_cannot_be_used_is_named_and_counted_and_stops_no_run(tmp_path):  # C19
    manifest = recordings(tmp_path, 6)
    (tmp_path / "r2.wav").write_bytes(b"RIFF")
    (tmp_path / "r3.wav").unlink()
    run = trained(tmp_path, "--data.kind=manifest", f"--data.train={manifest}", f"--data.dev={manifest}",
                  "--training.num_epochs=1")
    log = (run / "train.log").read_text()
    assert log.count("skipped r2: unreadable") == log.count("skipped r3: missing") == 2     # as train and as dev
    row, = history_of(run)
    assert (row["utterances"], row["skipped_utterances"], row["dev_skipped"]) == (4, 2, 2)

def test_a_failed_save_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):  # C28
    path = tmp_path / "latest.pt"
    files.save_atomic(path, {"a": torch.ones(2)})
    monkeypatch.setattr(os, "replace", raising(OSError(28, "no space left on device")))
    with pytest.raises(OSError, match=f"no space left on device: '{path}'"):
        files.save_atomic(path, {"a": torch.zeros(2)})
    assert torch.equal(torch.load(path, weights_only=True)["a"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["latest.pt"]

def test_features_that_stay_nan_stop_the_run_with_their_keys(tmp_path, monkeypatch, capsys):  # C31 C34
    failing_step(monkeypatch, 5, lambda batch: batch.feats.fill_(math.nan))
    run = trained(tmp_path, "--training.max_bad_steps=2", code=1)
    assert "2 non-finite or skipped steps in a row" in capsys.readouterr().err
    assert (run / "train.log").read_text().count("not finite, skipped; batch: toy_") == 2
    state = read_checkpoint(run / "checkpoints/latest.pt")
    assert state["progress"]["epoch"] == 1 and all(value.isfinite().all() for value in state["model"].values())

@pytest.mark.parametrize("arguments, words", [
    (["nowhere.yaml"], "nowhere.yaml"), (["CONFIG", "--training.batch_sise=3"], "batch_size"),
    (["--resume", "nowhere"], "no such file"), (["CONFIG", "--data.kind=manifest"], "data.train"),
    (["CONFIG", "--dry-run", "--data.batch_size=0"], "batch_size"),
    (["CONFIG", "--training.device=cuda"], "no GPU")])
def test_bad_input_is_one_error_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, words):  # C34
    if "cuda" in arguments[-1] and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    path = tiny_yaml(tmp_path / "tiny.yaml")
    monkeypatch.chdir(tmp_path)
    assert train.main([path if a == "CONFIG" else a for a in arguments]) == 2
    assert os.listdir(tmp_path) == ["tiny.yaml"]
    error = capsys.readouterr().err
    assert error.startswith("train.py: ") and words in error and "Traceback" not in error

@pytest.mark.parametrize("arguments", [
    "", "a.yaml --resume b", "a.yaml --compare b", "--resume a --compare b", "--dry-run", "a.yaml batch_size=3",
    "a.yaml --batch_size=3", "a.yaml --training.batch_size",
    "--resume a --dry-run", "a.yaml --average 2", "a.yaml --overfit 0", "a.yaml --dry-run --runs b",
    "--resume a --runs runs", "--resume="])
def test_bad_arguments_are_one_line_and_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(arguments.split())
    error = capsys.readouterr().err
    assert re.match(r"[\w.]+: ", error) and error.count("\n") == 1
    assert stop.value.code == 2 and train.parse_arguments(["a.yaml", "--overfit", "1"])[0].overfit == 1

def test_curves_stand_where_their_values_say():
    """Three panels, 200 px high from 66, 322 and 578: losses from 0.01 to 1, errors and rates from 0 to 1."""
    rows = [{"loss": 1.0, "dev_loss": 0.01, "wer": 1.0, "learning_rate": 0.0},
            {"loss": 0.1, "dev_loss": 0.1, "wer": 0.5, "learning_rate": 0.5},
            {"loss": 0.01, "dev_loss": 1.0, "wer": 0.0, "learning_rate": 1.0}]
    root = ElementTree.fromstring(plot.curves_svg(rows))
    paths = [e.get("d") for e in root.iter() if e.tag.endswith("path") and e.get("stroke") and "L" in e.get("d")]
    points = [[tuple(map(float, point.split())) for point in path[1:].split("L")] for path in paths]
    falling, rising = [(90, 0), (320, 100), (550, 200)], [(90, 200), (320, 100), (550, 0)]
    wanted = [(66, falling), (66, rising), (322, falling), (578, rising)]
    assert points == [[(x, y + top) for x, y in line] for top, line in wanted]
    texts = [e.text for e in root.iter() if e.tag.endswith("text")]
    assert "loss 0.01" in texts and "   on dev 1" in texts and "WER 0" in texts
    ticks = [e.text for e in root.iter() if e.get("text-anchor") == "end"]
    assert ticks == ["0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1"] + 2 * ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert [e.text for e in root.iter() if e.get("text-anchor") == "middle"] == 3 * ["1", "2", "3"]
    assert [plot.curves_svg(rows[:n]).count('h0.1"') for n in (1, 2)] == [4, 0]  # lines of one point
    assert plot.curves_svg(rows).count(" stroke-dasharray=") == 2  # the loss on dev and its name
    assert "M90.0 66.0L550.0 266.0" in plot.curves_svg([rows[0], {"loss": 0.0}, rows[2]])  # 0 has no logarithm
    assert plot.column([{"wer": 0.75, "token_accuracy": 0.75}], "token_accuracy") == [0.25]
    older = [{name: row[name] for name in ("loss", "learning_rate")} | {"wer": 8 * row["wer"]} for row in rows]
    assert plot.curves_svg(older).count("L320.0") == 3 and "M90.0 322.0L320.0 322.0L" in plot.curves_svg(older)

@pytest.mark.parametrize("low, high, log_scale, ticks", [
    (0, 1, False, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 0.24, False, [0, 0.05, 0.1, 0.15, 0.2, 0.25]),
    (0, 37, False, [0, 10, 20, 30, 40]), (0.3, 0.3, True, [0.2, 0.5]), (1, 1, True, [1, 2]),
    (0.4, 6, True, [0.2, 0.5, 1, 2, 5, 10]), (0.003, 2.2, True, [0.001, 0.01, 0.1, 1, 10]),
    (1, 100, True, [1, 2, 5, 10, 20, 50, 100]), (1, 100.5, True, [1, 10, 100, 1000]), (0, 1.1, False, [0, 0.5, 1, 1.5]),
    (-1.2, 1, False, [-1.5, -1, -0.5, 0, 0.5, 1]), (0, 1e-9, False, [0, 2e-10, 4e-10, 6e-10, 8e-10, 1e-9])])
def test_ticks_are_round_and_hold_their_values_between_them(low, high, log_scale, ticks):
    assert plot.round_ticks(low, high, log_scale) == ticks

def test_runs_are_compared_by_what_differs_in_them_and_by_their_best_epochs(tmp_path, capsys):  # C158
    runs = tmp_path / "runs"
    first, second = [trained(tmp_path, f"--training.learning_rate={rate}") for rate in ("1e-3", "5e-3")]
    (runs / "README.md").write_text("no run")
    for name, file in (("half", "metrics.json"), ("new", "config.yaml")):
        (runs / name).mkdir()
        (runs / name / file).write_text("[]")
    timed = [{**row, "seconds": 100.4 * (i + 1), "token_accuracy": (0.1, 0.3, 0.2)[i]}
             for i, row in enumerate(history_of(first))]
    (first / "metrics.json").write_text(json.dumps(timed))
    (second / "metrics.json").write_text(json.dumps(history_of(second)[:2]))
    written = (second / "config.yaml").read_text()
    (second / "config.yaml").write_text(written.replace("  patience: 0\n", ""))  # as an older one
    capsys.readouterr()
    assert train.main(["--compare", *map(str, sorted(runs.iterdir()))]) == 0  # the link latest is the second again
    head, *rows, left_out, curves = capsys.readouterr().out.splitlines()
    assert left_out == f"left out, no run with an epoch done: {runs / 'README.md'} {runs / 'half'} {runs / 'new'}"
    assert head.split() == ["run", "best", "epoch", *compare.FIGURES, "seconds", "what", "differs"]
    for row, run, rate in zip(rows, (first, second), ("0.001", "0.005"), strict=True):
        best = train.best_row(history_of(run))
        assert row.split()[:4] == [run.name, *("2 of 3".split() if run == first else [str(best["epoch"]), "of", "2"])]
        assert row.split()[4:8] == [f"{best[name]:.4f}" for name in compare.FIGURES]
        assert row.split()[8:] == [f"{history_of(run)[-1]['seconds']:.0f}", f"training.learning_rate={rate}"]
    root = ElementTree.parse(curves.removeprefix("curves: ")).getroot()
    lines = [e for e in root.iter() if e.tag.endswith("path") and "L" in e.get("d")]
    assert len(lines) == 2 * 4  # loss in training and on dev, WER, rate
    assert len([line for line in lines if line.get("stroke-dasharray")]) == 2
    error = refusal(capsys, "--compare", runs / "README.md", script=train)
    assert error == f"train.py: wanted folders of runs with an epoch done, got {runs / 'README.md'}\n"
    (first / "metrics.json").write_text("[")
    error = refusal(capsys, "--compare", first, script=train)
    assert error.startswith(f"train.py: {first / 'metrics.json'}: wanted the epochs of a run, got no JSON")

@slow
def test_the_toy_config_learns_its_task(tmp_path):
    """The figures that README promises, on as many utterances; the run ends as soon as it has them."""
    targets = ["--training.target_token_accuracy=0.99", "--training.target_sequence_accuracy=0.97"]
    argv = [str(HERE / "configs/toy.yaml"), "--runs", str(tmp_path), "--training.picture_epochs=0", *targets]
    assert train.main(argv) == 0
    best = train.best_row(history_of(run_of(tmp_path)))
    assert best["token_accuracy"] >= 0.99 and best["sequence_accuracy"] >= 0.97 and best["dev_utterances"] == 1000

# ---- train: survival ----

ZYGOTE = """
import json, os, runpy, signal, sys, time, traceback
import decode, serve, train
import torch._dynamo, torch.distributed.optim   # what the first step of an optimizer imports

def hold(script, name, calls, held):
    "Before the call of that number a process makes the folder `held`, and waits until it is gone."
    real, module = getattr(sys.modules[script], name), sys.modules[script]
    def held_back(*given):
        nonlocal calls
        calls -= 1
        if calls == 0:
            os.mkdir(held)
            while os.path.isdir(held):
                time.sleep(0.01)
        return real(*given)
    setattr(module, name, held_back)

print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(order["wait"], 9))
        signal.alarm(300)
        print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
        signal.alarm(0)
        continue
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        continue
    os.environ.update(order["env"])
    out = os.open(order["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1), os.dup2(out, 2)
    code = 70
    try:
        exec(order["first"])
        code = sys.modules[order["script"]].main(order["argv"])
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)
"""

class Zygote:
    """Starts the main of a script in processes that can be killed, and that import torch only once together."""

    def __init__(self):
        self.process = subprocess.Popen([sys.executable, "-c", ZYGOTE], cwd=HERE, text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, order: dict) -> int:
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, out: Path, *argv, script: str = "train", held: Path | None = None, first: str = "", **env) -> int:
        """first: code before main; held: the process stops with its eighth step, or third batch, as `hold` says."""
        if held:
            calls = {"train": ("train_step", 8), "decode": ("transcribe", 3)}
            first += f"hold(order['script'], *{calls[script]}, '{held}')"
        return self.ask({"script": script, "argv": list(map(str, argv)), "out": str(out), "env": env, "first": first})

    def start_ranks(self, out: Path, world: int, *argv, held: Path | None = None, **how) -> list[int]:
        """What torchrun does: `world` processes that know their number and where to meet -> their pids. The first
        writes to out, the others to a file with their number behind it, which `held` has of all."""
        meeting = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        pids = []
        for rank in range(world):
            path, hold = out.with_name(f"{out.name}{rank or ''}"), held and f"{held}{rank}"
            env = {"RANK": str(rank), "LOCAL_RANK": str(rank), **meeting}
            pids.append(self.start(path, *argv, held=hold, **how, **env))
        return pids

    def wait(self, pid: int) -> int:
        return self.ask({"wait": pid})

    def run(self, out: Path, *argv, script: str = "train", world: int = 1, first: str = "") -> str:
        """The output of the first of `world` processes, all of which must succeed."""
        codes = [self.wait(pid) for pid in self.start_ranks(out, world, *argv, script=script, first=first)]
        assert codes == [0] * world, out.read_text()
        return out.read_text()

CONSOLES = {  # what becomes of standard output and error before a script; of closed ones Python makes None
    "closed": "os.closerange(1, 3); sys.stdout = sys.stderr = None",
    "full": "os.dup2(os.open('/dev/full', os.O_WRONLY), 1); os.dup2(1, 2)",
    "gone": "a, b = os.pipe(); os.close(a); os.dup2(b, 1); os.dup2(b, 2); os.close(b)"}
AS_SCRIPT = """
sys.stdout, sys.stderr = (file and open(file.fileno(), "w", closefd=False) for file in (sys.stdout, sys.stderr))
sys.argv[1:] = order["argv"]
runpy.run_path(order["script"] + ".py", run_name="__main__")"""

@pytest.fixture(scope="module")
def zygote():
    zygote = Zygote()
    yield zygote
    zygote.process.communicate(timeout=PATIENCE)

def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])

def logged(run: Path) -> str:
    """train.log without times and speeds, and without the name of the run."""
    text = re.sub(r"\S*/(\d{8}_\d{6}_tiny\w*|run)(?=[/:])", "RUN", (run / "train.log").read_text())
    return re.sub(r"\d+:\d\d:\d\d|\d+ frames/s|wait +[\d.]+%", "#", text)

def assert_not_torn(run: Path) -> None:
    """Every file of a run that is there is whole."""
    assert run.exists() and (run / "checkpoints/latest.pt").exists() or (run / "checkpoints/previous.pt").exists()
    for path in run.rglob("*.pt"):
        read_checkpoint(path)
    rules.load(str(run / "config.yaml"))
    for name, reader in (("metrics.json", json.loads), ("curves.svg", ElementTree.fromstring)):
        assert not (run / name).exists() or len(reader((run / name).read_text()))

def assert_same_run(parts: Path, whole: Path) -> None:
    """Weights, optimizer, metrics.json, results.csv and train.log are equal, up to times, speeds and memory."""
    ours, theirs = (read_checkpoint(run / "checkpoints/latest.pt") for run in (parts, whole))
    for weights in ("model", "trained"):
        assert all(torch.equal(value, ours[weights][name]) for name, value in theirs[weights].items())
    for index, moments in theirs["optimizer"]["state"].items():
        assert all(torch.equal(value, ours["optimizer"]["state"][index][name]) for name, value in moments.items())
    rows = [without_times(history_of(run)) for run in (parts, whole)]
    assert rows[0] == rows[1] == without_times(ours["history"])
    tables = [list(csv.DictReader((run / "results.csv").read_text().splitlines())) for run in (parts, whole)]
    assert without_times(tables[0]) == without_times(tables[1])
    assert logged(parts) == logged(whole)

@pytest.fixture(scope="module")
def whole_run(zygote, tmp_path_factory):
    """-> arguments of a run, its folder after it ran uninterrupted, and how long that took."""
    folder = tmp_path_factory.mktemp("whole")
    argv = [tiny_yaml(folder / "tiny.yaml"), "--training.threads=1", "--training.checkpoint_steps=1",
            "--training.average_decay=0.8", "--model.ctc_weight=0.3", "--model.encoder.dropout=0.2"]
    began = time.monotonic()
    zygote.run(folder / "out", *argv, "--runs", str(folder / "runs"))
    return argv, run_of(folder / "runs"), time.monotonic() - began

def begun(zygote: Zygote, folder: Path, *argv: str, held: Path | None = None, first: str = "") -> tuple[int, Path]:
    """The pid and the folder of a run that has its first checkpoint, or is held."""
    pid = zygote.start(folder / "out", *argv, "--runs", folder / "runs", held=held, first=first)
    wait_until((held or folder / "runs/latest").exists)
    return pid, run_of(folder / "runs")

@pytest.mark.parametrize("kills, workers", [(3, 0), (1, 1), pytest.param(10, 0, marks=slow)])
def test_a_run_killed_at_any_moment_equals_an_uninterrupted_one(kills, workers, zygote, whole_run, tmp_path):  # C30 C83
    """SIGKILL, writing included: each step writes a checkpoint, which takes longer than the step."""
    (argv, whole, seconds), rng, done = whole_run, random.Random(kills), 0
    while done < kills:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        pid, run = begun(zygote, folder, *argv, f"--data.num_workers={workers}")
        for _ in range(min(5, kills - done)):
            time.sleep(rng.uniform(0.0, min(1.0, 0.5 * seconds)))      # the whole run may have stood still
            os.kill(pid, 9)
            done += zygote.wait(pid) != 0
            assert_not_torn(run)
            assert run_of(folder / "runs") == run
            pid = zygote.start(tmp_path / "out", "--resume", run)
        assert zygote.wait(pid) == 0
        assert_same_run(run, whole)
        assert not [path for path in run.rglob("*") if path.suffix == ".tmp" or path.name == "next.pt"]

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_sigterm_and_ctrl_c_end_a_run_that_goes_on_as_if_nothing_was(number, zygote, whole_run, tmp_path):  # C84
    """Sent to all processes of the run, as by timeout and terminals. SIGHUP, from one that is closed, ends none."""
    argv, whole, _ = whole_run
    argv = [*(a for a in argv if "checkpoint_steps" not in a), "--data.num_workers=1"]
    pid, run = begun(zygote, tmp_path, *argv, held=tmp_path / "held", first="os.setpgrp();")
    os.killpg(pid, number)
    (tmp_path / "held").rmdir()
    assert zygote.wait(pid) == 0
    out = (tmp_path / "out").read_text()
    if number != signal.SIGHUP:
        assert f"interrupted; go on with: python train.py --resume {run}" in out and "Traceback" not in out
        assert read_checkpoint(run / "checkpoints/latest.pt")["progress"]["step"] == 8
        zygote.run(tmp_path / "out", "--resume", run)
    assert_same_run(run, whole)

def test_a_second_process_on_a_run_is_told_who_works_on_it_until_that_one_is_dead(zygote, whole_run, tmp_path):  # C180
    argv, whole, _ = whole_run
    pid, run = begun(zygote, tmp_path, *argv, "--data.num_workers=1", held=tmp_path / "held")
    kept = (run / "train.log").read_text()
    assert zygote.wait(zygote.start(tmp_path / "second", "--resume", run)) == 2
    holder = f"process {pid} on {socket.gethostname()}"
    assert (tmp_path / "second").read_text() == (
        f"train.py: {run}: wanted a folder that no process works on, got one of {holder}\n")
    assert (run / "train.log").read_text() == kept
    os.kill(pid, signal.SIGKILL)
    zygote.wait(pid)
    zygote.run(tmp_path / "third", "--resume", run)
    assert_same_run(run, whole)

@pytest.mark.parametrize("console", CONSOLES)
def test_a_console_that_is_closed_full_or_gone_ends_no_run(zygote, tmp_path, console):  # C181
    argv = [tiny_yaml(tmp_path / "tiny.yaml"), "--runs", tmp_path / "runs"]
    assert zygote.wait(zygote.start(os.devnull, *argv, first=CONSOLES[console] + AS_SCRIPT)) == 0
    assert (run_of(tmp_path / "runs") / "train.log").read_text().count("\nepoch") == 3
    assert not (run_of(tmp_path / "runs") / "lock").read_text().startswith("epoch")

def test_a_signal_during_evaluation_loses_no_step(plain_run, tmp_path, monkeypatch):  # C84
    stop, real = threading.Event(), train.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(train, "catch_signals", lambda: stop)
        patch.setattr(train, "evaluate", lambda *arguments: stop.set() or real(*arguments))
        run = trained(tmp_path / "parts")
    progress = read_checkpoint(run / "checkpoints/latest.pt")["progress"]
    assert (progress["epoch"], progress["batch"], progress["step"]) == (0, 5, 5)
    assert train.main(["--resume", str(run)]) == 0
    assert_same_run(run, plain_run)

@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("plain"))

@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("finished"), "--training.num_epochs=2")

@pytest.fixture
def finished(finished_run, tmp_path) -> Path:
    """A copy of a run of two epochs."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))

def latest_with(change):
    """A planter of a run whose last checkpoint is changed."""
    return lambda run: spoilt(change)(run / "checkpoints/latest.pt")

def test_a_finished_run_that_is_extended_equals_one_that_was_as_long_from_the_start(tmp_path, capsys):  # C183
    options = ["--training.schedule=constant", "--training.average_decay=0.8"]
    whole = trained(tmp_path / "whole", *options, "--training.num_epochs=3")
    parts = trained(tmp_path / "parts", *options, "--training.num_epochs=1")
    for more in (["--training.num_epochs=2", "--data.num_workers=1"], ["--training.num_epochs=3"], []):
        assert train.main(["--resume", str(parts), *more]) == 0  # at last it is finished and stays so
        assert ("\ngoing on in epoch " in capsys.readouterr().out) == bool(more)
    ours, theirs = (read_checkpoint(run / "checkpoints/latest.pt") for run in (parts, whole))
    assert all(torch.equal(ours["trained"][name], value) for name, value in theirs["trained"].items())
    assert without_times(ours["history"]) == without_times(theirs["history"])
    written, expected = (rules.load(str(run / "config.yaml")) for run in (parts, whole))
    assert config.differing(written, expected).keys() == {"data.num_workers"}
    assert config.from_dict(ours["config"], "") == written

@pytest.mark.parametrize("override", [
    "model.encoder.num_layers=2", "model.ctc_weight=0.5", "data.num_mels=9", "data.kind=manifest", "data.unit=word",
    "data.sample_rate=8000", "data.lfr_n=2", "data.toy.num_symbols=5", "training.seed=7", "training.overfit=2"])
def test_an_option_that_a_run_began_with_cannot_change_and_is_named(finished, capsys, override):  # C183
    error = refusal(capsys, "--resume", finished, f"--{override}", script=train)
    assert error.startswith(f"train.py: {override.split('=')[0]}: cannot change")

def test_a_run_that_goes_on_within_an_epoch_keeps_its_batches_and_counts_its_time(finished, capsys):  # C183
    names = """frames padded_frames utterances tokens skipped_utterances loss wait loss_ce loss_quantity loss_ctc steps
        skipped_steps grad_norm""".split()
    totals = {**dict.fromkeys(names, 0.0), "seconds": 1000.0}
    progress = {"epoch": 0, "batch": 3, "step": 3, "bad_steps": 0, "totals": totals}
    latest_with(lambda state: state.update(progress=progress, history=[]))(finished)
    for gone in ("epoch", "batch"):
        state = {**read_checkpoint(finished / "checkpoints/latest.pt"), "progress": {**progress}}
        del state["progress"][gone]
        with pytest.raises(ValueError, match="x.pt: progress: wanted what to resume from, got "):
            checkpoint.check_state(state, "x.pt")
    error = refusal(capsys, "--resume", finished, "--training.batch_size=2", script=train)
    assert "training.batch_size: cannot change within an epoch" in error
    for batch in (1, 0):
        latest_with(lambda state: state.update(progress={**progress, "batch": batch}))(finished)
        with pytest.raises(ValueError, match="within an epoch") if batch else contextlib.nullcontext():
            checkpoint.last_checkpoint(finished, ["--training.batch_size=2"])
    latest_with(lambda state: state.update(progress=progress))(finished)
    assert train.main(["--resume", str(finished), "--training.num_epochs=3"]) == 0
    assert [1000 < row["seconds"] < 2000 for row in history_of(finished)] == [True] * 3
    log = (finished / "train.log").read_text()
    assert log.count("3 epochs will take about 0:5") == 1 and log.index("3 epochs will") < log.index("\nepoch 1/3")
    capsys.readouterr()
    assert refusal(capsys, "--resume", finished, "--training.num_epochs=2", script=train) == (
        "train.py: training.num_epochs: wanted 3, which are done, or more, got 2\n")

@pytest.mark.parametrize("spoil, words", [
    (latest_with(lambda state: state["config"]["model"]["encoder"].update(num_layers=2)),
     "another config than config.yaml"),
    (latest_with(lambda state: state.update(model={}, trained={})), "missing encoder"),
    (latest_with(lambda state: state.update(tokenizer=Tokenizer.build(["abcdefg"]).state())),
     "decoder.output.bias (8,), wanted (11,)"),
    (latest_with(lambda state: state.pop("format")), "format 2, got format 1"),
    (latest_with(lambda state: state.update(format=3)), "newer version"),
    (latest_with(lambda state: state.update(utterances=7, tokenizer=Tokenizer.build(["wxyz"]).state())),
     "train.py: data.train: wanted the 7 utterances that the run began with, got 20"),
    (lambda run: [path.write_bytes(b"PK") for path in (run / "checkpoints").glob("*.pt")], "cannot load"),
    (lambda run: (run / "train.log").unlink() or (run / "train.log").mkdir(), "Is a directory")])
def test_a_run_that_cannot_be_resumed_says_in_a_line_why_and_stays_as_it_is(finished, capsys, spoil, words):  # C85
    if "newer" in words:
        (finished / "checkpoints/previous.pt").unlink()
    spoil(finished)
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert train.main(["--resume", str(finished)]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error and error.strip().count("\n") == 0
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before

def test_a_run_of_an_older_version_goes_on_without_its_fields_that_are_gone(finished, tmp_path):  # C29
    latest_with(lambda state: state["config"]["training"].update(compile=False, keep_epochs=2))(finished)
    path = finished / "config.yaml"
    path.write_text(path.read_text().replace("training:\n", "training:\n  compile: false\n  keep_epochs: 2\n"))
    assert train.main(["--resume", str(finished)]) == 0
    assert train.main([str(path), "--runs", str(tmp_path)]) == 2  # a new run has no such field

@pytest.mark.parametrize("size", [0, 100, 5000, None])      # 5000: torch seeks to before the start, an OSError
def test_a_truncated_or_missing_latest_falls_back_to_the_previous_one(finished_run, finished, capsys, size):  # C85
    latest = finished / "checkpoints/latest.pt"
    latest.unlink() if size is None else os.truncate(latest, size)
    assert read_checkpoint(finished / "checkpoints/previous.pt")["progress"]["epoch"] == 1
    assert train.main(["--resume", str(finished)]) == 0
    error = capsys.readouterr().err
    assert "latest.pt: wanted a checkpoint" in error and "going on from" in error and "previous.pt" in error
    assert read_checkpoint(finished / "checkpoints/previous.pt")["progress"]["epoch"] == 1  # not the damaged one
    assert_same_run(finished, finished_run)

def test_a_latest_that_the_disk_does_not_give_is_not_taken_for_a_damaged_one(finished, monkeypatch, capsys):  # C85
    latest, real = finished / "checkpoints/latest.pt", torch.load
    before = latest.read_bytes()

    def broken(path, **options):
        if Path(path) == latest:
            raise OSError(5, "Input/output error", str(path))
        return real(path, **options)

    monkeypatch.setattr(torch, "load", broken)
    assert "Input/output error" in refusal(capsys, "--resume", finished, script=train)
    assert latest.read_bytes() == before

@pytest.mark.parametrize("name", ["next.pt", "metrics.json", "train.log"])
def test_a_full_disk_ends_the_run_after_its_last_checkpoint(plain_run, tmp_path, monkeypatch, capsys, name):  # C85
    """From the second checkpoint on, one of its files cannot be written."""
    real, real_say, writes = files.replacing, train.say, collections.Counter()

    @contextlib.contextmanager
    def full(target):
        writes[target.name] += 1
        with real(target) as temporary:
            yield temporary
            if target.name == name and writes["next.pt"] >= 2:
                target.with_name(f"{target.name}.1.tmp").write_bytes(temporary.read_bytes()[:7])
                raise OSError(28, "No space left on device", str(target))

    def no_log(run, line):
        if name == "train.log" and writes["next.pt"] >= 2:
            raise OSError(28, "No space left on device", str(run.folder / "train.log"))
        return real_say(run, line)

    with monkeypatch.context() as patch:
        patch.setattr(files, "replacing", full)
        patch.setattr(train, "say", no_log)
        run = trained(tmp_path / "parts", "--training.checkpoint_steps=4", code=2)
    error = capsys.readouterr().err
    assert "No space left on device" in error and "free some space, then go on with: python" in error
    assert error.strip().count("\n") == 0 and "Traceback" not in error
    assert read_checkpoint(run / "checkpoints/latest.pt")["progress"]["step"] in (0, 4)
    assert train.main(["--resume", str(run)]) == 0
    assert_same_run(run, plain_run)

@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])
def test_a_batch_that_does_not_fit_ends_the_run_after_its_last_checkpoint(tmp_path, monkeypatch, capsys, error):  # C86
    failing_step(monkeypatch, 7, raising(error))
    run = trained(tmp_path, code=2)
    assert capsys.readouterr().err == (
        "train.py: out of memory: wanted a smaller training.batch_frames, or a larger training.accumulate; the last "
        f"checkpoint is good: go on with: python train.py --resume {run}\n")
    assert read_checkpoint(run / "checkpoints/latest.pt")["progress"]["step"] == 5

MEMORY = "out of memory: wanted a smaller training.batch_frames, or a larger training.accumulate"

@pytest.mark.parametrize("error, line", [
    (torch.OutOfMemoryError("CUDA"), MEMORY), (RuntimeError("not enough memory: you tried"), MEMORY),
    (RuntimeError("DataLoader worker (pid 7) is killed\nmore"),
     "DataLoader worker (pid 7) is killed; too little memory? data.num_workers=0 loads without it"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated."),
     "DataLoader worker (pid 7) is killed by signal: Terminated.; sent to all processes of the run? send it to the "
     "first alone; data.num_workers=0 loads without it"),
    (RuntimeError("gloo: closed\nmore"), "another process of the run has ended: gloo: closed"),
    (torch.distributed.DistError("lost\nmore"), "another process of the run has ended: lost"),
    (ValueError("Traceback (most recent\n  File\nValueError: a: wanted b"), "ValueError: a: wanted b"),
    (ValueError("a: wanted b\nc"), "a: wanted b\nc"), (RuntimeError("shapes differ"), "")])
def test_an_error_is_a_line_on_what_can_be_done_and_a_fault_of_ours_is_none(error, line):
    assert train.explain(error) == line

def test_a_loader_process_that_dies_ends_the_run_with_a_line(tmp_path, monkeypatch, capsys):  # C86
    real = data.ToySeq2SeqDataset.__getitem__

    def deadly(dataset, item):
        if isinstance(item, tuple) and item[0] == 1:  # the second epoch, in a loader process only
            os.kill(os.getpid(), 9)
        return real(dataset, item)

    look = torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data
    with monkeypatch.context() as patch:
        patch.setattr(look, "__defaults__", (0.1,))     # s between looks at the loader, in place of 5
        patch.setattr(data.ToySeq2SeqDataset, "__getitem__", deadly)
        run = trained(tmp_path, "--data.num_workers=1", code=2)
    error = capsys.readouterr().err
    assert error.startswith("train.py: DataLoader worker (pid") and error.count("\n") == 1
    assert "data.num_workers=0 loads without it; the last checkpoint is good: go on with: python" in error
    assert train.main(["--resume", str(run)]) == 0

def test_starting_from_a_model_needs_a_vocabulary_and_a_config_that_fit(finished_run, tmp_path, capsys):  # C85
    start = f"--training.init_from={finished_run}/checkpoints/latest.pt"
    manifest = write_manifest(tmp_path / "train.jsonl", [{"audio": "a.wav", "text": "xyz xyz"}])
    trained(tmp_path, start, "--data.kind=manifest", f"--data.train={manifest}", code=2)
    assert "without 7 of their 7 symbols, the most frequent 'x' 'y' 'z' ' '" in capsys.readouterr().err
    trained(tmp_path, start, "--data.num_mels=20", code=2)
    assert "data.num_mels: wanted 8, as the model of training.init_from=" in capsys.readouterr().err
    trained(tmp_path, start, "--data.kind=manifest", f"--data.train={manifest}", "--data.unit=word", code=2)
    assert "data.unit: wanted char, as the model of training.init_from=" in capsys.readouterr().err
    trained(tmp_path, start, "--model.encoder.hidden_dim=32", code=2)
    error = capsys.readouterr().err
    assert "weights do not fit the model of its config: " in error and re.search(r"; and \d+ more\n$", error)
    assert error.count(";") == files.MOST_NAMED

def test_a_model_to_start_from_has_its_own_config_but_for_what_is_typed(finished_run, tmp_path):  # C85
    (tmp_path / "latest").symlink_to(finished_run)      # as runs/latest, which the new run will be
    place = f"{tmp_path}/latest/checkpoints/latest.pt"
    path = tmp_path / "other.yaml"
    path.write_text(TINY.replace("model:\n", "model:\n  sampling_ratio: 0.25\n  mwer_weight: 2.0\n"))
    typed = ["--model.encoder.dropout=0.25", f"--training.init_from={place}"]
    adopted = checkpoint.adopted(rules.load(str(path), typed), typed)
    assert adopted.training.init_from == str(finished_run / "checkpoints/latest.pt")
    theirs = checkpoint.load_parts(place).config.model
    assert theirs.sampling_ratio != 0.25 and theirs.encoder.dropout != 0.25
    encoder = replace(theirs.encoder, dropout=0.25)
    assert adopted.model == replace(theirs, encoder=encoder, mwer_weight=2.0)      # a loss of the run's own
    assert checkpoint.start_from(adopted).model.encoder.dropout.p == 0.25

# ---- train: several processes, accumulation, memory ----

def test_without_torchrun_there_is_one_process_and_every_sum_is_its_own(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    net, sums = tiny_model(), {"a": 1, "b": 2}
    assert ranks.join_processes() == (0, 1) == (ranks.own_rank(), ranks.num_ranks()) and ranks.is_first_process()
    assert ranks.sum_over_ranks(sums) is sums and ranks.share_model(net) is net
    assert ranks.sum_by_name(sums, {"b": 3, "c": 4}) == {"a": 1, "b": 5, "c": 4} and sums == {"a": 1, "b": 2}
    monkeypatch.setenv("RANK", "1")
    assert not ranks.is_first_process()

EXACT = ["--training.threads=1", "--training.precision=float64", "--training.batch_size=5", "--data.toy.num_train=21",
         "--model.encoder.dropout=0", "--model.decoder.dropout=0", "--model.predictor.dropout=0"]

def test_two_processes_and_two_parts_give_the_weights_of_one_process(zygote, tmp_path):  # C88
    """10 steps on batches of 5, 5, 5, 5 and 1 utterances, of which a rank's share is empty; in float64,
    as in float32 Adam makes much of the rounding of a gradient that is 0; also resumed on as many as the other had."""
    argv = [tiny_yaml(tmp_path / "tiny.yaml"), *EXACT, "--training.num_epochs=2", "--training.max_grad_norm=3"]
    runs = {}
    for name, world, parts in (("one", 1, 1), ("two", 2, 1), ("parts", 1, 2), ("both", 2, 2)):
        folder = tmp_path / f"runs_{name}"
        zygote.run(tmp_path / name, *argv, f"--training.accumulate={parts}", "--runs", folder, world=world)
        runs[name] = run_of(folder)
    for name in ("two", "two1"):
        assert "Warning" not in (tmp_path / name).read_text()  # of torch; train.py's own begin in lower case
    assert len(list((tmp_path / "runs_two").iterdir())) == 2  # rank 0 alone makes a folder, and points latest at it
    for name, world in (("two", 1), ("one", 2)):  # after an epoch on as many processes as the other
        moved = Path(shutil.copytree(runs[name], tmp_path / f"moved_{name}"))
        os.replace(moved / "checkpoints/previous.pt", moved / "checkpoints/latest.pt")
        zygote.run(tmp_path / "out", "--resume", moved, world=world)
        runs[f"moved {name}"] = moved
    wanted = read_checkpoint(runs["one"] / "checkpoints/latest.pt")
    assert wanted["progress"]["step"] == 10
    for name, run in runs.items():
        state = read_checkpoint(run / "checkpoints/latest.pt")
        for weight, value in wanted["trained"].items():
            torch.testing.assert_close(state["trained"][weight], value, rtol=0, atol=1e-6, msg=f"{name} {weight}")
        for ours, theirs in zip(*map(without_times, (state["history"], wanted["history"])), strict=True):
            ours["padding"] = theirs["padding"]  # of the parts
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)

def test_two_processes_with_batchnorm_give_the_weights_of_two_parts(zygote, tmp_path):  # C88
    """A part is normalised by its own statistics, and the utterances of the parts and of the ranks are the same; the
    running statistics are then the mean over the ranks, equal in both."""
    argv = [tiny_yaml(tmp_path / "tiny.yaml"), *as_flags(RELATIVE), *EXACT, "--training.num_epochs=2"]
    states = []
    for world, parts in ((2, 1), (1, 2)):
        runs = tmp_path / f"runs{world}"
        zygote.run(tmp_path / f"out{world}", *argv, f"--training.accumulate={parts}", "--runs", runs, world=world)
        states.append(read_checkpoint(run_of(runs) / "checkpoints/latest.pt")["trained"])
    statistics = [name for name in states[0] if "running" in name or "num_batches" in name]
    assert len(statistics) == 3
    for name in states[0].keys() - statistics:
        torch.testing.assert_close(states[0][name], states[1][name], rtol=0, atol=1e-6, msg=name)
    assert states[0][statistics[-1]] < states[1][statistics[-1]]

@pytest.mark.parametrize("number", [9, 15])
def test_a_rank_that_dies_ends_the_run_and_a_signal_to_one_stops_all(zygote, tmp_path, number):  # C89
    argv = [tiny_yaml(tmp_path / "tiny.yaml"), "--training.threads=1", "--training.num_epochs=1000"]
    pids = zygote.start_ranks(tmp_path / "out", 2, *argv, "--runs", tmp_path / "runs")
    wait_until((tmp_path / "runs/latest").exists)
    os.kill(pids[1], number)
    codes = [zygote.wait(pid) for pid in pids]
    out = (tmp_path / "out").read_text()
    if number == 9:
        assert codes == [1, -9] and "another process of the run has ended" in out and "Traceback" not in out
    else:
        assert codes == [0, 0] and "interrupted; go on with" in out
    read_checkpoint(run_of(tmp_path / "runs") / "checkpoints/latest.pt")

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]

@slow
def test_torchrun_ends_with_the_error_of_a_rank(tmp_path):  # C89
    command = [*TORCHRUN, HERE / "train.py", tiny_yaml(tmp_path / "tiny.yaml"), "--data.kind=manifest"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode and "data.train: wanted a manifest" in done.stderr

def test_blocks_that_are_computed_again_save_memory_and_change_no_weight_beyond_rounding():  # C90
    """A step with dropout, on the same draws; recompute draws them twice and must draw the same. Names stay."""
    models = [tiny_model() for _ in range(2)]
    names = list(models[1].state_dict())
    train.recompute_blocks(models[1])
    saved, losses = [], []
    for tiny in models:
        for module in tiny.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
        optimizer, sizes = train.make_optimizer(tiny, 0.0), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            losses.append(train.train_step(tiny, optimizer, tiny_batch(), 0.1, config.TrainingConfig(), 3).sums["loss"])
        saved.append(sum(sizes))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and list(models[1].state_dict()) == names
    for ours, theirs in zip(*(tiny.parameters() for tiny in models)):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    assert saved[1] < 0.8 * saved[0]

@pytest.mark.parametrize("parts", [1, 2])
def test_blocks_that_are_computed_again_learn_the_statistics_of_batchnorm_once(tmp_path, parts):  # C90
    options, found = rules.load(tiny_yaml(tmp_path / "tiny.yaml"), as_flags(RELATIVE)).model, []
    for recompute in (False, True):
        torch.manual_seed(0)
        tiny = build(options, 8, 8)
        if recompute:
            train.recompute_blocks(tiny)
        training = config.TrainingConfig(accumulate=parts)
        train.train_step(tiny, train.make_optimizer(tiny, 0.0), tiny_batch(), 0.1, training)
        found.append(ranks.batch_statistics(tiny))
    assert found[0][2] == parts
    torch.testing.assert_close(found[0], found[1])

# ---- train: dry run, overfitting, pictures, fine-tuning ----

def test_a_dry_run_counts_parameters_and_shapes_as_they_are_and_leaves_nothing(tmp_path, capsys, monkeypatch):  # C91
    monkeypatch.chdir(tmp_path)
    assert train.main([tiny_yaml(tmp_path / "tiny.yaml"), "--dry-run"]) == 0
    text = capsys.readouterr().out
    found = re.findall(r"^ *(\S+) +([\d,]+) +\S+%", text, re.MULTILINE)
    counts = {name: int(count.replace(",", "")) for name, count in found}
    tiny = tiny_model()
    assert counts["model"] == sum(p.numel() for p in tiny.parameters())
    assert counts["encoder.blocks"] == sum(p.numel() for p in tiny.encoder.blocks.parameters())
    assert counts["model"] == sum(count for name, count in counts.items() if "." not in name and name != "model")
    assert all(count and name.count(".") < 2 for name, count in counts.items())
    shapes = dict(re.findall(r"^ *(\S+) .*-> (\(.*\))$", text, re.MULTILINE))
    B, T, U = map(int, re.search(r"feats \((\d+),(\d+),8\), tokens \(\d+,(\d+)\)", text).groups())
    assert shapes["encoder.norm"] == f"({B},{(T + 1) // 2},16)" and shapes["decoder"] == f"({B},{U},8)"
    assert "5 steps an epoch, 15 in all" in text
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.yaml"]

def test_activations_are_what_is_kept_for_the_backward_pass_in_mb_without_the_weights(tmp_path, monkeypatch):
    run, kept = train.make_run(rules.load(tiny_yaml(tmp_path / "tiny.yaml"))), torch.zeros(1_000_000)

    @contextlib.contextmanager
    def saved(pack, unpack):
        for x in (kept, kept[5:], next(run.model.parameters())):
            pack(x)
        yield

    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", saved)
    monkeypatch.setattr(dry_run, "rehearse", lambda *arguments: None)
    assert dry_run.traced_step(run, None)[1] == 4.0

def test_a_dry_run_tells_memory_in_megabytes_and_times_in_their_units(tmp_path, monkeypatch):
    """2 M weights of 4 bytes, four times, or five with an average; three batches in 0.6 s."""
    monkeypatch.setattr(dry_run, "num_parameters", lambda model: 2_000_000)
    monkeypatch.setattr(dry_run, "traced_step", lambda run, batch: ([], 12.3))
    monkeypatch.setattr(dry_run, "timeit", lambda work, number: 0.6 * number)
    real, drawn = data.loader, []
    monkeypatch.setattr(data, "loader", lambda dataset, batches: drawn.append(batches) or real(dataset, batches))
    for decay, memory in (("0", "32 MB for weights, gradients and two moments"), ("0.5", "40 MB for weights, gradients "
                                                                                   "and two moments and the average")):
        options = [f"--training.average_decay={decay}", "--training.num_epochs=9000"]
        run = train.make_run(rules.load(tiny_yaml(tmp_path / "tiny.yaml"), options))
        batches = train.epoch_batches(run, 0)
        text = "\n".join(dry_run.describe(run, batches))
        by_size = sorted(batches, key=lambda batch: len(batch) * run.train_set.lengths()[batch].max())
        assert drawn.pop() == [by_size[i] for i in (0, 2, 4, 4)]    # the middles of thirds, and the largest
        assert f"memory: {memory}, 12 MB of activations" in text
        assert "time: 200 ms a step, 5 steps an epoch, 45000 in all: about 2:30:00 of steps" in text

@pytest.mark.parametrize("steps, changes, options", [
    (600, {"warmup_steps": 120}, []), (599, {"warmup_steps": 119}, ["num_epochs"]),
    (600, {"warmup_steps": 121}, ["warmup_steps"]), (1000, {"average_decay": 0.995}, []),
    (1000, {"average_decay": 0.9951}, ["average_decay"]),
    (5, {"warmup_steps": 0, "average_decay": 0.5}, ["num_epochs", "average_decay"]),
    (88, {"num_epochs": 22, "warmup_steps": 200, "average_decay": 0.999},
     ["num_epochs", "warmup_steps", "average_decay"]),
    (1280, {"warmup_steps": 256, "average_decay": 1 - 1 / 256}, []),
    (1279, {"warmup_steps": 256, "average_decay": 1 - 1 / 256}, ["warmup_steps", "average_decay"])])
def test_a_schedule_that_cannot_work_is_told_with_values_that_would_do(steps, changes, options):  # C157
    training = config.TrainingConfig(**{"num_epochs": 10, "warmup_steps": 0, **changes})
    lines = list(dry_run.schedule_warnings(training, steps))
    assert [line.split(":")[0] for line in lines] == [f"training.{name}" for name in options]
    tried = dict(re.findall(r"; try --training\.(\w+)=(\S+)$", "\n".join(lines), re.MULTILINE))
    assert list(tried) == options
    mended = replace(training, **{name: type(getattr(training, name))(value) for name, value in tried.items()})
    assert list(dry_run.schedule_warnings(mended, steps * mended.num_epochs // training.num_epochs)) == []

def test_fewer_dev_utterances_than_ten_are_told_with_the_share_that_has_as_many():
    manifest = config.Config(data=config.DataConfig(kind="manifest"))
    assert not list(dry_run.dev_warnings(manifest, 90, 10))
    hints = ["corpora.py folder --dev-share 0.1", "corpora.py folder --dev-share 0.5", "record 20 or more"]
    for num_train, hint in zip((94, 11, 10), hints):
        assert next(dry_run.dev_warnings(manifest, num_train, 9)).endswith(hint)

def test_the_values_that_are_proposed_for_a_short_run_are_exact():
    training = config.TrainingConfig(num_epochs=10, warmup_steps=100, average_decay=0.999)
    assert list(dry_run.schedule_warnings(training, 123)) == [
        "training.num_epochs: wanted a run of 600 steps or more, got 123; try --training.num_epochs=49",
        "training.warmup_steps: wanted at most a fifth of the run's 123 steps, got 100; try --training.warmup_steps=12",
        "training.average_decay: wanted an average over at most a fifth of the run's 123 steps, got 0.999, over 1000; "
        "try --training.average_decay=0.918"]
    assert list(dry_run.schedule_warnings(training, 10))[2].endswith("try --training.average_decay=0.0")
    for steps in (0, 1):
        line, = dry_run.schedule_warnings(config.TrainingConfig(num_epochs=10, warmup_steps=0), steps)
        assert line.endswith("try --training.num_epochs=6000")
    for origin, least in (("", 600), ("a.pt", 100)):    # whoever goes on from a model's weights needs fewer
        training = config.TrainingConfig(num_epochs=10, warmup_steps=0, init_from=origin)
        assert not [*dry_run.schedule_warnings(training, least)]
        assert f"wanted a run of {least} steps" in next(dry_run.schedule_warnings(training, least - 1))
    for name in ("toy", "toy_ctc", "toy_transformer"):      # README's first commands begin without a warning
        recipe = rules.load(str(HERE / f"configs/{name}.yaml"))
        steps = recipe.data.toy.num_train // recipe.training.batch_size * recipe.training.num_epochs
        assert not [*dry_run.schedule_warnings(recipe.training, steps)]

@pytest.mark.parametrize("many, few, kind, init_from, hint", [
    (10, 10, "conformer", "", None), (11, 10, "conformer", "", "try --model.encoder.subsampling=2"),
    (11, 11, "conformer", "", "try --model.encoder.subsampling=1"), (11, 10, "sanm", "", "belong to these recordings?"),
    (11, 10, "transformer", "a.pt", "belong to these recordings?")])
def test_texts_too_long_for_their_frames_are_told_when_more_than_a_tenth_are(many, few, kind, init_from, hint):
    """100 recordings of 40 frames, 10 behind a subsampling of 4; so many have 11 tokens or more, so many 21."""
    options = config.Config()
    encoder = replace(options.model.encoder, kind=kind, subsampling=4)
    options = replace(options, model=replace(options.model, encoder=encoder),
                      training=replace(options.training, init_from=init_from))
    place = np.arange(100)
    counts = np.where(place < few, 21, np.where(place < many, 11, 10))
    lines = list(dry_run.length_warnings(options, np.full(100, 40), counts))
    assert len(lines) == (hint is not None) and all("in 11% of recordings" in x and x.endswith(hint) for x in lines)

def test_a_sample_of_a_large_training_set_is_looked_at(monkeypatch):
    """Every third of 1,001 texts, so that they are 500 at most; of these 20 files. A vocabulary that comes from a model
    may lack symbols of the training texts too, and a front end of its own has its rate."""
    options = config.Config(data=config.DataConfig(kind="manifest"))
    dataset = data.ManifestDataset([manifests.Row("k", "a.wav", "a", 1.0)] * 1001, options.data, letters)
    encoded, opened = [], []
    monkeypatch.setattr(dry_run, "rates_of", lambda dataset, indices: opened.extend(indices) or [])
    tokenizer = SimpleNamespace(encode=lambda text: encoded.append(text) or [4])
    splits = []
    monkeypatch.setattr(dry_run, "symbol_warnings", lambda config, tokenizer, split: splits.append(split) or [])
    for start, looked_at, files in (("", ["dev"], list(range(0, 1001, 51))), ("a.pt", ["train", "dev"], [])):
        named = replace(options, data=replace(options.data, train="t.jsonl", dev="d.jsonl"),
                        training=replace(options.training, init_from=start))
        run = SimpleNamespace(config=named, train_set=dataset, dev_set=dataset, tokenizer=tokenizer)
        assert list(dry_run.warnings(run, 1000)) == []
        assert (len(encoded), opened, splits) == (334, files, looked_at)
        for found in (encoded, opened, splits):
            found.clear()

@pytest.mark.parametrize("texts, init_from, told", [
    (["dc ab", "ab"], "", "1 unknown ones of 3 (33.3%), the most frequent 'dc' (1), in 1 texts; try --data.unit=char"),
    (["x dc"], "", "2 unknown ones of 2 (100.0%), the most frequent 'x' (1) 'dc' (1), in 1 texts; "
                   "try --data.train=TRAIN with k0 in it, and others that have them"),
    (["x", "dc"], "a.pt", "2 unknown ones of 2 (100.0%), the most frequent 'x' (1) 'dc' (1), in 2 texts; "
                          "the vocabulary is that of training.init_from=a.pt"),
    (["x", "dc"], "", "2 unknown ones of 2 (100.0%), the most frequent 'x' (1) 'dc' (1), in 2 texts; "
                      "try --data.train=TRAIN with k0 in it, and others that have them"),
    (["dc"], "", "1 unknown ones of 1 (100.0%), the most frequent 'dc' (1), in 1 texts; try --data.unit=char"),
    (["ab"], "", None)])
def test_words_that_the_vocabulary_has_not_are_told_with_what_would_help(tmp_path, texts, init_from, told):
    paths = [str(write_manifest(tmp_path / f"{name}.jsonl", [
        {"audio": "a.wav", "text": text, "key": f"k{i}"} for i, text in enumerate(rows)]))
        for name, rows in (("train", ["ab cd"]), ("dev", texts))]
    options = config.Config(data=config.DataConfig(kind="manifest", train=paths[0], dev=paths[1], unit="word"),
                            training=config.TrainingConfig(init_from=init_from))
    lines = list(dry_run.symbol_warnings(options, Tokenizer.build(["ab cd"], "word"), "dev"))
    wanted = "data.dev: wanted symbols that the vocabulary has, got "
    assert lines == ([] if told is None else [wanted + told.replace("TRAIN", paths[0])])

@pytest.mark.parametrize("wanted, rates, value", [
    (16000, [8000, 8000, 16000], "8000"), (16000, [44100, 8000], ""), (8000, [8000, 16000], ""), (16000, [], ""),
    (16000, [8000, 16000], ""), (8000, [16000, 16000, 8000], "16000"), (16000, [16000], ""),
    (8000, [15999], ""), (15999, [16000], "16000")])
def test_a_sample_rate_that_most_recordings_do_not_have_is_told(wanted, rates, value):  # C157
    lines = list(dry_run.rate_warnings(wanted, rates))
    assert [re.search(r"try --data\.sample_rate=(\d+)", line)[1] for line in lines] == ([value] if value else [])

def test_data_that_cannot_work_are_told_in_a_dry_run_and_a_run_and_not_once_they_are_mended(tmp_path, capsys):  # C157
    """Sixteen recordings of 0.5 s at 8 kHz with 20 letters each, 12 frames behind a subsampling of 4."""
    wav = spoken(tmp_path / "a.wav", 0.5)
    rows = [{"audio": wav, "text": "abcde" * 4, "key": f"r{i}"} for i in range(16)]
    for name, kept, text in (("train", rows, "abcde"), ("dev", rows[:9], "abq"), ("all", rows, "abc")):
        write_manifest(tmp_path / f"{name}.jsonl", [*kept[1:], {**kept[0], "text": text}])
    told = ["--data.kind=manifest", f"--data.train={tmp_path}/train.jsonl", "--model.encoder.subsampling=4"]
    dev = f"--data.dev={tmp_path}/dev.jsonl"
    assert train.main([tiny_yaml(tmp_path / "tiny.yaml"), *told, dev, "--dry-run"]) == 0
    lines = re.findall("^warning: (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert [line.split(":")[0] for line in lines] == [
        "training.num_epochs", "data.dev", "data.dev", "model.encoder.subsampling", "data.sample_rate"]
    assert "--dev-share 0.4" in lines[1]
    argv = [tiny_yaml(tmp_path / "tiny.yaml"), *told, dev, f"--runs={tmp_path}/no", f"--data.test={tmp_path}/gone"]
    assert train.main(argv) == 2 and not (tmp_path / "no").exists()
    assert capsys.readouterr().err.startswith(f"train.py: data.test: {tmp_path}/gone: wanted a text file, got none")
    assert "1 unknown ones of " in lines[2] and "the most frequent 'q' (1), in 1 texts" in lines[2]
    log = (trained(tmp_path, *told, dev, "--training.num_epochs=1") / "train.log").read_text()
    assert re.findall("^warning: (.*)$", log, re.MULTILINE)[2:] == lines[1:]
    values = re.findall(r"try (--\S+=\w+)$", "\n".join(lines), re.MULTILINE)
    assert [value.split("=")[1] for value in values] == ["150", "2", "8000"]
    capsys.readouterr()
    argv = [str(tmp_path / "tiny.yaml"), *told, f"--data.dev={tmp_path}/all.jsonl", *values, "--dry-run"]
    assert train.main(argv) == 0 and "warning" not in capsys.readouterr().out

def test_a_recording_of_unknown_length_is_not_taken_for_one_with_too_few_frames(tmp_path):
    """Half of them are not there: they will be skipped for that, and no option mends it."""
    for i in range(5):
        spoken(tmp_path / f"{i}.wav", 0.5)
    path = str(write_manifest(tmp_path / "m.jsonl", [{"audio": f"{i}.wav", "text": "abc"} for i in range(10)]))
    options = config.Config(data=config.DataConfig(kind="manifest", train=path, dev=path, sample_rate=8000))
    dataset = data.open_dataset(options.data, "train", letters)
    run = SimpleNamespace(config=options, train_set=dataset, dev_set=dataset, tokenizer=Tokenizer.build(["abc"]))
    assert dataset.lengths().tolist().count(0) == 5 and list(dry_run.warnings(run, 1000)) == []

def test_shares_of_a_run_become_the_steps_that_they_are_and_its_config_says_so(tmp_path):
    """15 steps: a fifth is 3 of warm-up, and an average over 3 has the decay 2/3."""
    default = "--training.warmup_steps=100"  # as TINY has another, which shares do not allow
    shares = [default, "--training.warmup_share=0.2", "--training.average_share=0.2"]
    run = trained(tmp_path / "shares", *shares)
    same = trained(tmp_path / "steps", "--training.warmup_steps=3", f"--training.average_decay={1 - 1 / 3}")
    assert rules.load(str(run / "config.yaml")) == rules.load(str(same / "config.yaml"))
    assert_same_run(run, same)
    path = tiny_yaml(tmp_path / "tiny.yaml")
    for more, words in (("warmup_steps=3", "warmup_steps: wanted its default 100 beside warmup_share"),
                        ("average_decay=0.9", "average_decay: wanted its default 0.0 beside average_share")):
        refused(f"training.{words}", rules.load, path, [*shares, f"--training.{more}"])
    for share, field, value in (("warmup", "warmup_steps", 3), ("average", "average_decay", 1 - 1 / 3)):
        one = train.make_run(rules.load(path, [default, f"--training.{share}_share=0.2"])).config.training
        assert getattr(one, field) == value and getattr(one, f"{share}_share") == 0.0
    given = rules.load(path, ["--training.patience=3", "--training.average_decay=0.9", "--training.warmup_steps=20"])
    heart = replace(given.training, overfit=2, num_epochs=100, schedule="constant", patience=0, average_decay=0.0,
                    target_token_accuracy=1.0, target_sequence_accuracy=1.0)
    for changed, wanted in ((given.training, heart), (replace(given.training, warmup_steps=21), heart),
                            (rules.load(path, shares).training, heart),
                            (replace(given.training, warmup_steps=3), replace(heart, warmup_steps=3))):
        assert train.overfitting(replace(given, training=changed), 2).training == wanted

def test_overfitting_learns_its_utterances_and_says_when_it_fails(tmp_path, capsys, monkeypatch):  # C91
    options = ["--overfit", "2", "--training.learning_rate=5e-3", "--data.augment.channel_std=5"]
    good = trained(tmp_path / "good", *options)
    best = train.best_row(history_of(good))
    assert (best["token_accuracy"], best["sequence_accuracy"], best["dev_utterances"]) == (1.0, 1.0, 2)
    assert " 2 utterances, " in (good / "train.log").read_text().splitlines()[0]
    run = train.make_run(rules.load(str(good / "config.yaml")))
    whole = data.open_dataset(run.config.data, "train", run.tokenizer.encode, 0, run.stats)
    for item in (run.train_set[3, 1], run.dev_set[0, 1]):  # nothing but the first ones, as they are
        assert item.key == whole[1].key and torch.equal(item.feats, whole[1].feats)
    assert collections.Counter(itertools.chain(*train.epoch_batches(run, 3))) == {0: 10, 1: 10}
    assert sorted(key for batch in train.dev_batches(run) for key in batch.keys) == [whole[0].key, whole[1].key]
    monkeypatch.setattr(train, "OVERFIT_EPOCHS", 1)
    trained(tmp_path / "bad", *options, code=1)
    assert "failed to learn 2 utterances by heart" in capsys.readouterr().out

def test_a_picture_that_fails_is_logged_and_the_run_goes_on(tmp_path, monkeypatch):  # C92
    dropout = "--model.encoder.dropout=0.5"
    whole = trained(tmp_path / "whole", dropout)
    monkeypatch.setattr(pictures, "utterance_svgs", raising(IndexError("no such frame")))
    run = trained(tmp_path / "broken", dropout, "--training.picture_epochs=1")
    assert (run / "train.log").read_text().count("no such frame") == 3
    assert without_times(history_of(run)) == without_times(history_of(whole))  # dropout is on again after the failure

@pytest.mark.parametrize("architecture, unused", [
    ("paraformer", "never"), ("transformer", "predictor"), ("ctc", "decoder|predictor")])
def test_pictures_show_what_the_model_of_that_epoch_decodes(tmp_path, architecture, unused):  # C92
    """Their title is the text that greedy decoding gives, and their boundaries stand where its tokens begin."""
    path = Path(tiny_yaml(tmp_path / "tiny.yaml"))
    path.write_text(re.sub(rf"  ({unused}):\n(    .*\n)+", "", path.read_text()))  # one without effect is an error
    argv = [str(path), f"--model.name={architecture}", "--training.picture_epochs=2", "--training.num_epochs=4"]
    assert train.main([*argv, "--runs", str(tmp_path / "runs")]) == 0
    run = run_of(tmp_path / "runs")
    names = sorted(path.name for path in (run / "pictures").glob("*_alignment_*"))
    assert names == [f"{i}_alignment_{epoch}.svg" for i in (1, 2, 3) for epoch in ("0002", "0004")]
    page = (run / "pictures/index.html").read_text()  # one epoch at a time, chosen with a slider
    sections = re.findall(r"<section( hidden)?><h2>epoch (\d)</h2>(.*?)</section>", page)
    assert [(hidden, epoch) for hidden, epoch, _ in sections] == [(" hidden", "2"), ("", "4")]
    assert [re.findall('src="([^"]*)"', images) for *_, images in sections] == [names[::2], names[1::2]]
    assert '<input type="range" min="1" max="2" value="2"' in page and "<script" not in page
    system = checkpoint.load_system(run / "checkpoints/latest.pt", "cpu")
    dev = data.open_dataset(system.config.data, "dev", system.tokenizer.encode, 0, system.stats)
    for i in range(3):
        root = ElementTree.parse(run / f"pictures/{i + 1}_alignment_0004.svg").getroot()
        found = system.model.greedy(dev[i].feats[None], torch.tensor([len(dev[i].feats)]))
        ids = found.tokens[0, :found.lens[0]].tolist()
        title = next(e.text for e in root.iter() if e.get("class") == "title")
        assert title == f"{dev[i].key}: {dev[i].text}, recognised as {system.tokenizer.decode(ids)}"
        lines = [e for e in root.iter() if e.get("class") == "fire" and "V" in e.get("d")]
        spelled = [u for u, id in enumerate(ids) if id not in (BLANK, SOS, EOS)]
        edges = found.boundaries[0][spelled + [u + 1 for u in spelled[-1:]]] / len(dev[i].feats)
        assert [float(e.get("d")[1:].split()[0]) for e in lines] == pytest.approx(
            (plot.LEFT + plot.WIDTH * edges).tolist(), abs=0.06)

def fine_tuned(folder: Path, variant: str, texts: list[str], *options: str) -> Path:
    """A run from a published model on the kit's recordings."""
    rows = [{"audio": str(kit(f"wavs/{name}.wav")), "text": text} for name, text in zip(WAVS, texts)]
    manifest = write_manifest(folder / "train.jsonl", rows)
    assert train.main([str(HERE / "configs/finetune.yaml"), "--runs", str(folder / "runs"), f"--data.train={manifest}",
                       f"--training.init_from={kit(variant)}", "--training.device=cpu", *options]) == 0
    return run_of(folder / "runs")

def test_fine_tuning_starts_from_the_published_weights_and_learns(tmp_path):
    """Four recordings, texts of the vocabulary: the loss of the last epoch is far below that of the first."""
    texts = ["我 在 人", "hello world", "thank 你 们", "他 说 dog"]
    run = fine_tuned(tmp_path, "sanm", texts, "--training.num_epochs=6", "--training.learning_rate=4e-3",
                     "--training.warmup_steps=0", "--training.schedule=constant")
    rows = history_of(run)
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    tuned = checkpoint.load_system(run / "checkpoints/latest.pt", "cpu")
    published = kit_system("sanm")
    assert tuned.config.model == published.config.model and tuned.tokenizer == published.tokenizer

# ---- decode: recognition ----

def tiny_system(kind: str = "manifest", name: str = "paraformer", encoder: dict = {}, decoder: dict = {},
                **options) -> checkpoint.System:
    """A model with random weights that fires about every fourth frame; the same at every call."""
    sizes = dict(num_layers=1, hidden_dim=16, num_heads=2)
    section = config.ModelConfig(name=name, encoder=config.EncoderConfig(**{"subsampling": 2, **sizes, **encoder}),
                                 decoder=config.DecoderConfig(**{**sizes, **decoder}),
                                 predictor=config.PredictorConfig(hidden_dim=16))
    options = config.DataConfig(kind=kind, train="x", dev="x", num_mels=8, sample_rate=8000, **options)
    tokenizer = Tokenizer.build(["abcd efgh"])
    torch.manual_seed(3)
    network = build(section, 8, len(tokenizer)).eval()
    stats = torch.tensor([[0.0] * 8, [1.0] * 8])
    return checkpoint.System(config.Config(model=section, data=options), tokenizer, stats, network)

def saved(system: checkpoint.System, path: Path) -> str:
    checkpoint.export(system, str(path))
    return str(path)

@pytest.fixture(scope="module")
def ckpt(tmp_path_factory) -> str:
    return saved(tiny_system(), tmp_path_factory.mktemp("ckpt") / "tiny.pt")

def ragged_feats(lens: list[int]) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return [torch.randn(n, 8, generator=rng) for n in lens]

def test_a_batch_gives_each_utterance_what_it_gets_alone():  # C5
    system, feats = tiny_system(), ragged_feats([31, 0, 7, 1, 50, 22, 0])
    together = decode.transcribe(system, feats)
    for i, x in enumerate(feats):
        alone = decode.transcribe(system, [x])[0]
        assert [t.id for t in together[i].tokens] == [t.id for t in alone.tokens] and together[i].text == alone.text
        for a, b in zip(together[i].tokens, alone.tokens):
            assert (a.confidence, a.start, a.end) == pytest.approx((b.confidence, b.start, b.end), abs=2e-3)
    assert together[1] == together[6] == report.Result("", 0.0, [], []) and len(together[4].tokens) > 3
    assert decode.transcribe(system, []) == []

def test_results_are_planted_tokens_in_seconds_with_probabilities():  # C33
    log_probs = torch.log(torch.tensor([[0.5, 0.125], [0.912345, 1]]))
    found = Hypotheses(torch.tensor([[4, 5], [6, 0]]), torch.tensor([2, 1]), log_probs,
                       [torch.tensor([1.0, 3.0, 7.0]), torch.tensor([0.0, 8.0])], torch.zeros(2, 4), [])
    result = decode.read_result(tiny_system(), found, 0)
    assert [token[:5] for token in result.tokens] == [(" ", 4, 0.5, 0.01, 0.03), ("a", 5, 0.125, 0.03, 0.07)]
    assert (result.text, result.confidence) == (" a", 0.25) and not any(token.hotword for token in result.tokens)
    assert [token[:5] for token in decode.read_result(tiny_system(), found, 1).tokens] == [("b", 6, 0.9123, 0.0, 0.08)]
    silent = found._replace(lens=torch.tensor([0, 1]), boundaries=[torch.zeros(1, dtype=torch.float64)])
    assert decode.read_result(tiny_system(), silent, 0) == report.Result("", 0.0, [], [])

def spoken(path: Path, seconds: float) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    audio.save_wav(path, 0.1 * torch.randn(int(8000 * seconds), generator=torch.Generator().manual_seed(5)), 8000)
    return str(path)

def test_one_broken_recording_is_reported_and_the_rest_come_in_the_order_given(ckpt, tmp_path, capsys):  # C33 C34
    good, short = spoken(tmp_path / "b.wav", 1.0), spoken(tmp_path / "a\n\tb.wav", 0.0)
    (tmp_path / "bad.wav").write_bytes(b"RIFF1234WAVEjunk")
    output = tmp_path / "out.jsonl"
    code = decode.main(["--ckpt", ckpt, good, str(tmp_path / "bad.wav"), short, str(tmp_path / "no.wav"),
                        "--output", str(output)])
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    said = err.splitlines()
    assert said[0] == (f"decode.py: {tmp_path}/bad.wav: unreadable: wanted a 'data' chunk among the first 10000, "
                       "got none")
    assert said[1:3] == [f"decode.py: {tmp_path}/a  b.wav: no samples, so its text is empty",
                         f"decode.py: {tmp_path}/no.wav: missing"]
    assert code == 1 and said[3].startswith("2 utterances, 1 without samples, ")
    assert said[3].endswith("2 could not be recognised")
    assert out == "".join(f"{key}\t{row['text']}\n" for key, row in zip((good, f"{tmp_path}/a  b.wav"), rows))
    assert [row["key"] for row in rows] == [good, short] and rows[1]["text"] == "" and rows[1]["tokens"] == []
    feats = audio.frontend(*audio.load_wav(good), tiny_system().config.data, tiny_system().stats)
    wanted = decode.transcribe(tiny_system(), [feats])[0]
    assert rows[0]["text"] == wanted.text and rows[0]["tokens"] == [report.token_entry(t) for t in wanted.tokens]
    assert all(0 <= t["start"] <= t["end"] <= 1.0 and 0 <= t["confidence"] <= 1 for t in rows[0]["tokens"])

def scored(*pairs: tuple[str, str]) -> list[report.Score]:
    """(reference, recognised) each -> their Scores."""
    system, encode = tiny_system(), tiny_system().tokenizer.encode
    tokens = lambda text: [report.Token(c, i, 1.0, 0, 0) for c, i in zip(text, encode(text))]
    result = lambda text: report.Result(text, 1.0, tokens(text), [])
    return [report.score(report.Outcome(i, f"u{i}", 1.0, ref, result(hyp)), system.tokenizer.encode)
            for i, (ref, hyp) in enumerate(pairs)]

def test_the_report_adds_errors_and_divides_once():  # C75
    scores, heading = scored(("ab cd", "ab"), ("a", "a"), ("b", "c d")), "most frequent confusions (*** is nothing):"
    assert [re.sub("  95% interval .*", "", line) for line in report.report_lines(scores)] == [
        "token accuracy 0.1429  sequence accuracy 0.3333  (3 utterances with a reference)",
        "%WER 75.00 [ 3 / 4, 1 ins, 1 del, 1 sub ]", "%CER 85.71 [ 6 / 7, 2 ins, 3 del, 1 sub ]",
        "sentence accuracy 0.3333 (1 of 3 texts without an error)", heading,
        "     1  *** -> c", "     1  b -> d", "     1  cd -> ***"]
    assert report.report_lines(scores + scored(("b b", "d")))[4:] == [
        heading, "     2  b -> d", "     1  *** -> c", "     1  b -> ***", "     1  cd -> ***"]
    assert report.report_lines(scored(("b", "d"), ("b", "")))[5:] == ["     1  b -> ***", "     1  b -> d"]
    assert len(report.report_lines(scores[1:2])) == 4
    assert len(report.report_lines(scored(("一二三四五六七八九十百", "")))) == 5 + 10     # of 11 errors the ten first
    assert report.error_figure([Counts(1, 2, 3, 4)] * 9) == (
        "150.00 [ 54 / 36, 18 ins, 27 del, 9 sub ]  95% interval 150.00 to 150.00")
    assert report.error_figure([Counts(1, 0, 0, 4)]) == "25.00 [ 1 / 4, 0 ins, 0 del, 1 sub ]"     # one tells no spread

def batches_seen(monkeypatch) -> list[list[int]]:
    """The frames of each utterance of every batch that is decoded from now on."""
    real, seen = decode.transcribe, []
    monkeypatch.setattr(decode, "transcribe",
                        lambda system, feats: seen.append([len(x) for x in feats]) or real(system, feats))
    return seen

def recognised(system: checkpoint.System, path: str | os.PathLike) -> list[report.Outcome]:
    return decode.recognise_inputs(system, decode.open_inputs(system, [path], None), [0])

def test_a_report_has_the_errors_of_each_utterance_for_a_reader(ckpt, tmp_path, capsys):  # C75
    wav = spoken(tmp_path / "a.wav", 0.7)
    text = decoded(capsys, "--ckpt", ckpt, wav)[1][0][1]
    rows = [{"audio": wav, "text": text, "key": "right"}, {"audio": wav, "text": text + " 你好"}, {"audio": wav},
            {"audio": wav, "text": " \u3000"}]      # two without a reference
    manifest = write_manifest(tmp_path / "dev.jsonl", rows)
    code, _, error = decoded(capsys, "--ckpt", ckpt, manifest, "--report", tmp_path / "report")
    n = len(text.split())
    summary, alignments = ((tmp_path / f"report/{name}.txt").read_text() for name in ("summary", "alignments"))
    assert code == 0 and error.startswith(summary) and f"%WER {100 / (2 * n + 1):.2f} [ 1 / {2 * n + 1}, " in summary
    assert summary.endswith("     1  你 -> ***\n     1  好 -> ***\n") and "sentence accuracy 0.5000 (1 of 2 " in summary
    right, wrong, end = alignments.split("\n\n")
    assert right.splitlines()[:1] == [f"right: 0 of {n} (0 sub, 0 ins, 0 del)"] and end == ""
    assert wrong == f"a: 2 of {n + 2} (0 sub, 0 ins, 2 del)\n" + format_alignment([*text.split(), *"你好"], text.split())
    none = tmp_path / "none"
    error = decoded(capsys, "--ckpt", ckpt, wav, "--report", none)[2]
    assert f"warning: --report {none}: no input has a reference" in error
    assert not none.exists()

@pytest.mark.parametrize("n, rate, drawn", [(400, 0.1, (0.0725, 0.1325)), (100, 0.5, (0.4, 0.6))])
def test_the_bootstrap_interval_is_the_normal_one_of_independent_utterances(n, rate, drawn):  # C75
    """Utterances of 10 words, all wrong or all right: mean rate +- 1.96 sqrt(p (1 - p) / n). drawn: numbers of this
    code, by which published intervals can be repeated."""
    wrong = round(n * rate)
    counts = [Counts(10, 0, 0, 10)] * wrong + [Counts(0, 0, 0, 10)] * (n - wrong)
    half = 1.96 * math.sqrt(rate * (1 - rate) / n)
    assert report.bootstrap_interval(counts) == pytest.approx((rate - half, rate + half), abs=0.15 * half)
    assert report.bootstrap_interval(counts) == pytest.approx(drawn)
    assert report.bootstrap_interval([Counts(1, 0, 0, 4)] * 9) == (0.25, 0.25)
    assert report.bootstrap_interval([Counts(0, 2, 0, 0)]) == (2.0, 2.0)

def spoilt(change):
    """A planter of a checkpoint whose state is changed."""
    def plant(path: Path) -> None:
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)
    return plant

def misfit(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    weights = {**state["model"], "extra": torch.zeros(1), "decoder.norm.bias": torch.zeros(3)}
    del weights["decoder.norm.weight"]
    torch.save({**state, "model": weights}, path)

@pytest.mark.parametrize("plant, words", [
    (lambda path: path.unlink(), "no such file"), (lambda path: path.write_bytes(b"junk"), "cannot load"),
    (lambda path: torch.save({"model": {}}, path), "without config, tokenizer, stats"),
    (lambda path: torch.save(PurePosixPath("x"), path), "cannot load"),
    (misfit, "missing decoder.norm.weight; unused extra; decoder.norm.bias (3,), wanted (16,)"),
    (spoilt(lambda state: state.update(format="x")), "format: wanted a whole number, got 'x'"),
    (spoilt(lambda state: state.update(stats=[1, 2])), "stats: wanted a tensor (2,F) of floats, got [1, 2]"),
    (spoilt(lambda state: state.update(stats=torch.zeros(3, 8))), "stats: wanted a tensor (2,F)"),
    (spoilt(lambda state: state.update(model=[])), "model: wanted tensors by name, got []"),
    (spoilt(lambda state: state["model"].update({"decoder.norm.bias": torch.zeros(16).to_sparse()})),
     "wanted a dense tensor"),
    (spoilt(lambda state: state["model"]["decoder.norm.bias"].fill_(math.nan)),
     "got NaN or infinity in decoder.norm.bias"),
    (spoilt(lambda state: state["config"]["model"]["encoder"].update(hidden_dim=10 ** 9)),
     "model.encoder.hidden_dim: wanted a size"),
    (spoilt(lambda state: state["config"]["model"]["decoder"].update(num_layers=10 ** 9)),
     "model.decoder.num_layers: wanted a size")])
def test_a_file_that_is_no_checkpoint_is_one_line_and_exit_code_2(tmp_path, capsys, plant, words):  # C32 C34
    path = Path(saved(tiny_system(), tmp_path / "x.pt"))
    plant(path)
    error = refusal(capsys, "--ckpt", path, "x.wav")
    assert error.startswith(f"decode.py: {path}: ") and words in error

def refused_arguments(capsys, *arguments: str) -> str:
    """What the parser says to arguments that it refuses, "" to others."""
    try:
        decode_options.parse_arguments(arguments)
        return ""
    except SystemExit as stop:
        error = capsys.readouterr().err
        assert stop.code == 2 and error.count("\n") == 1
        return error.rstrip("\n")

@pytest.mark.parametrize("arguments", [
    "--batch-size=0", "--limit=-1", "--nonsense", "--threads=x", "--threads=-1", "--batch-seconds=0",
    "--batch-seconds=inf", "--format=srt", "--format=srt --output=x.jsonl", "--output=x --format=doc", "--dtype=int4",
    "--min-segment-sec=0.5 --max-segment-sec=0.99", "--min-segment-sec=0.09", "--max-segment-sec=nan",
    "--max-segment-sec=inf", "--plot-layer=1", "--plot=x --plot-layer=-1", "--threads=99999999999999999999",
    "--batch-seconds=1e308", "--limit=1000000000", "--resume", "--vad-schedule=funasr", "--vad=x --min-segment-sec=2",
    "--vad=x --max-segment-sec=30", "--stream", "--stream - --pcm=999", "--stream a.wav --pcm=8000", "--pcm=8000",
    "--chunk=10", "--chunk=1.5,2", "--look-back=1,2,3", "--output=", "--report=", "--plot=", "--export=", "--vad=",
    "--punctuate="])
def test_bad_decoding_arguments_exit_with_2_and_are_named(capsys, arguments):
    assert arguments.split()[-1].split("=")[0] in refused_arguments(capsys, *arguments.split())

def test_decoding_arguments_at_their_exact_bounds_are_taken(capsys):
    for arguments in ("--batch-size=1", "--batch-seconds=0.001", "--limit=999999999",
                      "--min-segment-sec=0.1 --max-segment-sec=0.2", "--min-segment-sec=10",
                      "--plot=x --plot-layer=1", "--stream - --pcm=1000", "--vad=x --vad-schedule=funasr"):
        assert refused_arguments(capsys, *arguments.split()) == "", arguments

def test_what_is_not_told_to_decoding_has_its_default():
    given = vars(decode_options.parse_arguments([]))
    assert {name: value for name, value in given.items() if type(value) in (int, float)} == {
        "limit": 0, "threads": 0, "plot_layer": 0, "batch_size": 16, "batch_seconds": 300.0, "min_segment_sec": 1.0,
        "max_segment_sec": 20.0, "beam": 1, "nbest": 1, "length_penalty": 0.6, "coverage_penalty": 0.0}
    system = tiny_system()
    assert (system.batch_size, system.batch_seconds, system.segment_sec) == (16, 300.0, checkpoint.SEGMENT_SEC) == (
        16, 300.0, (1.0, 20.0))
    limits = [decode.batch_limits(system._replace(batch_seconds=sec)) for sec in (1e-3, 0.0299, 300.0)]
    assert limits == [(16, 1), (16, 2), (16, 30000)]
    assert (decode.POOL_SEC, decode.WINDOW, decode.LAID_OUT_SEC) == (300.0, 1024, 300.0)

def test_an_option_without_effect_beside_export_or_stream_is_refused_by_name(capsys):
    """All options but those named have none, or, beside --stream, are refused once the model is known."""
    given = {"format": "txt", "dtype": "bfloat16", "vad_schedule": "funasr", "chunk": "8,4", "look_back": "3,1",
             "pcm": "8000"}
    usual = vars(decode_options.parse_arguments([]))
    with_stream = {"chunk", "look_back", "punctuate", "batch_size", "batch_seconds", "min_segment_sec",
                   "max_segment_sec", *baselines.Search._fields}
    for mode, own, taken in (("--export=x", "export", set()), ("--stream a.wav", "stream", with_stream)):
        for name in usual.keys() - taken - {"inputs", "search", "ckpt", "device", "dtype", "threads", own}:
            option, value = f"--{name.replace('_', '-')}", usual[name]
            if value is not False:  # no flag
                option += "=" + given.get(name, str(value / 2 if type(value) is float and value else (value or 0) + 1))
            assert option.split("=")[0] in refused_arguments(capsys, *mode.split(), option), (mode, option)

# ---- decode: inputs and outputs ----

def decoded(capsys, *arguments) -> tuple[int, list[list[str]], str]:
    """-> exit code, [key, text] of every line of standard output, standard error."""
    code = decode.main(["--device", "cpu", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, [line.split("\t") for line in captured.out.splitlines()], captured.err

def json_rows(out: Path, *arguments) -> list[dict]:
    """What decode.py writes to the file `out`, a row each."""
    assert decode.main(["--device=cpu", f"--output={out}", *map(str, arguments)]) == 0
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]

def test_folders_standard_input_and_lists_give_what_their_files_give(ckpt, tmp_path, capsys, monkeypatch):  # C72
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    files = [spoken(folder / name, seconds) for name, seconds in (("b.WAV", 0.4), ("c.wav", 0.9), ("sub/a.wav", 0.6))]
    (folder / "notes.txt").write_text("no recording")
    (folder / "takes.wav").mkdir()
    code, wanted, _ = decoded(capsys, "--ckpt", ckpt, *files)
    assert code == 0 and [key for key, _ in wanted] == files and all(text for _, text in wanted)

    def piped(body: bytes):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(body)))
        return decoded(capsys, "--ckpt", ckpt, "-")

    assert decoded(capsys, "--ckpt", ckpt, folder)[1] == wanted
    assert piped(Path(files[1]).read_bytes())[1] == [["stdin", wanted[1][1]]]
    lines = [files[2], json.dumps({"audio": files[0], "key": "k"}), str(folder / "sub"), ""]
    assert piped("\n".join(lines).encode())[1] == [wanted[2], ["k", wanted[0][1]], wanted[2]]
    (tmp_path / "empty").mkdir()
    for body in (b"", b"\xff\xfe"):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(body)))
        refusal(capsys, "--ckpt", ckpt, "-")
    monkeypatch.setattr(sys, "stdin", None)  # closed: <&-
    for path in (tmp_path / "empty", "", "-"):
        refusal(capsys, "--ckpt", ckpt, path)

def test_names_and_texts_that_are_no_utf8_are_decoded_and_written(ckpt, tmp_path, monkeypatch):  # C72
    folder = tmp_path / "in"
    folder.mkdir()
    spoken(folder / "x\udcff.wav", 0.5)
    (folder / "x\udcff.txt").write_text("ab")
    assert corpora.main(["folder", str(folder), str(tmp_path / "out"), "--dev-share", "0"]) == 0
    rows = [{"audio": "in/x\udcff.wav", "text": "a\ud800"}, {"audio": "\ud800.wav"}, {"audio": "no\udcff.wav"}]
    manifest = write_manifest(tmp_path / "in.jsonl", rows)
    monkeypatch.setattr(sys, "stdout", open(tmp_path / "shown", "w", encoding="utf-8"))
    for i, (code, source) in enumerate(((0, folder), (1, manifest), (0, tmp_path / "out/train.jsonl"))):
        assert decode.main(["--ckpt", ckpt, "--device", "cpu", "--output", str(tmp_path / f"{i}.jsonl"),
                            "--report", str(tmp_path / "report"), str(source)]) == code
        (row,) = map(json.loads, (tmp_path / f"{i}.jsonl").read_text("utf-8").splitlines())
        assert row["key"] == ("x\ufffd" if i else f"{folder}/x\ufffd.wav")
        assert row.get("reference") == (None, "a\ufffd", "ab")[i]
    reasons = [data.ManifestDataset(manifest, tiny_system().config.data, lambda text: [], for_training=False)[i].reason
               for i in (1, 2)]
    assert all(reason.encode() for reason in reasons)

@pytest.mark.parametrize("form", list(report.FORMS))
def test_each_utterance_has_its_file_in_the_form_asked_for(ckpt, tmp_path, capsys, form):  # C73
    out = tmp_path / "new/out"
    (tmp_path / "sub").mkdir()
    files = [spoken(tmp_path / name, seconds) for name, seconds in (("a.wav", 1.0), ("sub/a.wav", 0.5))]
    code, texts, _ = decoded(capsys, "--ckpt", ckpt, *files, "--output", out, "--format", form)
    outcomes = [outcome for file in files for outcome in recognised(tiny_system(), file)]
    written = {str(path.relative_to(out)): path.read_text() for path in out.rglob("*") if path.is_file()}
    parts = [report.FORMS[form](outcome) for outcome in outcomes]
    assert code == 0 and [text for _, text in texts] == [outcome.result.text for outcome in outcomes]
    assert written == ({"results.ctm": "".join(parts)} if form == "ctm" else
                       {f"a.{form}": parts[0], f"sub/a.{form}": parts[1]})

def test_an_output_file_whose_name_a_folder_has_ends_the_run_before_anything_is_decoded(ckpt, tmp_path, capsys):  # C73
    file = spoken(tmp_path / "a.wav", 0.5)
    for output, form in (("out.jsonl", "json"), ("out", "ctm")):
        (tmp_path / ("out/results.ctm" if form == "ctm" else output)).mkdir(parents=True)
        error = refusal(capsys, "--ckpt", ckpt, file, "--output", tmp_path / output, "--format", form)
        assert error.startswith("decode.py: --output: wanted a file")
    manifest = write_manifest(tmp_path / "m.jsonl", [{"audio": "a.wav", "text": "ab"}])
    before = manifest.read_text()
    refusal(capsys, "--ckpt", ckpt, manifest, "--output", manifest)
    assert manifest.read_text() == before

def test_a_batch_that_fails_loses_only_the_utterance_that_it_fails_on(ckpt, tmp_path, capsys, monkeypatch):  # C74
    real = decode.transcribe
    files = [spoken(tmp_path / f"{i}.wav", 0.3 + i / 10) for i in range(5)]
    wanted = decoded(capsys, "--ckpt", ckpt, *files)[1]

    def failing(system, feats):
        if any(len(x) == 48 for x in feats):                    # 0.5 s
            raise RuntimeError("out of\nmemory")
        return real(system, feats)

    monkeypatch.setattr(decode, "transcribe", failing)
    code, texts, error = decoded(capsys, "--ckpt", ckpt, *files)
    assert (code, texts) == (1, wanted[:2] + wanted[3:])
    assert f"{files[2]}: the model failed: out of memory\n" in error and "; 1 could not be recognised" in error

def fork_decoding(transcribe, arguments: list[str], folder: Path) -> int:
    """The process id of a decode.py that has this `transcribe`; folder: of what it prints."""
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever ran before
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.stdout = open(folder / "shown", "w", buffering=1)
            sys.stderr = open(folder / "said", "w", buffering=1)
            decode.transcribe = transcribe
            torch.set_num_threads(1)        # OpenMP's other threads are the parent's: a fork waits for them for ever
            status = decode.main(arguments)
        finally:
            os._exit(status)
    return pid

@pytest.mark.parametrize("name, number, code", [
    ("out.jsonl", signal.SIGKILL, -9), ("out.jsonl", signal.SIGINT, 130), ("out.jsonl", signal.SIGHUP, 129),
    ("out.ctm", signal.SIGKILL, -9), ("out.ctm", signal.SIGTERM, 143), ("out", signal.SIGKILL, -9),
    ("out", signal.SIGINT, 130)])
def test_ended_decoding_goes_on(ckpt, tmp_path, capsys, monkeypatch, name, number, code):  # C34 C74 C182
    """The third of five batches ends the process; then everything equals a run that nothing ended."""
    real, calls = decode.transcribe, []
    form = {"out.jsonl": "json", "out.ctm": "ctm", "out": "txt"}[name]
    rows = [{"audio": spoken(tmp_path / f"{i}.wav", 0.9 - i / 10), "text": "ab cd", "key": "same"} for i in range(5)]
    manifest = write_manifest(tmp_path / "m.jsonl", rows)

    def arguments(output: str, *more: str) -> list[str]:
        return ["--device=cpu", "--threads=1", "--ckpt", ckpt, "--batch-size=1", "--format", form, "--output",
                str(tmp_path / output), *more, str(manifest)]

    def ended(system, feats):
        calls.append(len(feats))
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return real(system, feats)

    assert os.waitstatus_to_exitcode(os.waitpid(fork_decoding(ended, arguments(name), tmp_path), 0)[1]) == code
    if number != signal.SIGKILL:
        assert (tmp_path / "shown").read_text().count("same\t") == 2
        said = (tmp_path / "said").read_text()
        assert said.startswith("interrupted; the same command with --resume goes on\n") and "\n2 utterances, " in said
    part = tmp_path / f"{name}.part"
    if name == "out":
        assert len(list((tmp_path / name).glob("*.txt"))) == 2
    else:
        assert (tmp_path / name).exists() == (number != signal.SIGKILL)
        for file in [part] + [tmp_path / name] * (number != signal.SIGKILL):
            assert len(file.read_text().splitlines()) == 2
        assert part.name in refusal(capsys, *arguments(name)) and json.loads(part.read_text().splitlines()[0])["text"]
        part.write_text(part.read_text() + '{"key": "same", "te')  # a line that broke off
    calls = batches_seen(monkeypatch)
    (tmp_path / "model.pt").touch()     # exported by the run that was ended
    more = ["--resume", "--report", str(tmp_path / "resumed"), "--export", str(tmp_path / "model.pt")]
    assert decode.main(arguments(name, *more)) == 0
    assert len(calls) == 3 and "going on: 2 of 5 are done" in capsys.readouterr().err
    assert decode.main(arguments(f"whole_{name}", "--report", str(tmp_path / "report"))) == 0
    if name == "out":
        assert {p.name: p.read_text() for p in (tmp_path / "out").iterdir()} == {
            p.name: p.read_text() for p in (tmp_path / "whole_out").iterdir()}
    else:
        assert (tmp_path / name).read_text() == (tmp_path / f"whole_{name}").read_text() and not part.exists()
    if form == "json":      # the others have no results to read back
        once, twice = ((tmp_path / folder / "alignments.txt").read_text() for folder in ("report", "resumed"))
        assert once == twice
    capsys.readouterr()
    if name == "out.jsonl":
        assert "got 'same' twice" in refusal(capsys, *arguments(name, "--resume"))

def test_a_run_that_ended_goes_on_with_new_inputs_and_counts_all_errors(ckpt, tmp_path, capsys, monkeypatch):  # C182
    rows = [{"audio": spoken(tmp_path / f"{i}.wav", 0.9 - i / 10), "text": "ab cd"} for i in range(5)]
    first = write_manifest(tmp_path / "first.jsonl", rows[1:4])
    both = write_manifest(tmp_path / "both.jsonl", rows)
    assert decoded(capsys, "--ckpt", ckpt, "--output", tmp_path / "o.jsonl", first)[0] == 0
    assert decoded(capsys, "--ckpt", ckpt, "--output", tmp_path / "w.jsonl", "--report", tmp_path / "w", both)[0] == 0
    calls = batches_seen(monkeypatch)
    again = ["--ckpt", ckpt, "--output", tmp_path / "o.jsonl", "--resume", "--report", tmp_path / "o", both]
    assert decoded(capsys, *again)[0] == 0 and sum(map(len, calls)) == 2
    assert (tmp_path / "o.jsonl").read_text() == (tmp_path / "w.jsonl").read_text()
    assert (tmp_path / "o/summary.txt").read_text() == (tmp_path / "w/summary.txt").read_text()
    assert decoded(capsys, "--ckpt", ckpt, "--output", tmp_path / "o.jsonl", "--resume", first)[0] == 0
    # those of others stay
    assert sorted((tmp_path / "o.jsonl").read_text()) == sorted((tmp_path / "w.jsonl").read_text())
    texts = []
    for more in ([], ["--resume"]):  # of a ctm, which is none of these lines, all is decoded again
        assert decoded(capsys, "--ckpt", ckpt, "--output", tmp_path / "o.ctm", *more, first)[0] == 0
        texts.append((tmp_path / "o.ctm").read_text())
    assert texts[0] == texts[1] and sum(map(len, calls)) == 2 + 3 + 3

@pytest.mark.parametrize("name, kind, left", [
    ("out.jsonl", "file", []), ("out.txt", "file", []), ("out", "folder", ["out/a.json"])])
def test_a_second_process_on_an_output_is_told_who_writes_it(ckpt, tmp_path, capsys, name, kind, left):  # C182
    file, out = spoken(tmp_path / "a.wav", 0.5), tmp_path / name
    told, tell = os.pipe()

    def stuck(system, feats):
        os.write(tell, b"here")
        signal.pause()

    pid = fork_decoding(stuck, ["--device=cpu", "--ckpt", ckpt, "--output", str(out), file], tmp_path)
    try:
        assert select.select([told], [], [], PATIENCE)[0]
        for more in ([], ["--resume"]):
            error = refusal(capsys, "--ckpt", ckpt, "--output", out, *more, file)
            assert error == (f"decode.py: {out}: wanted a {kind} that no process works on, got one of process {pid} on "
                             f"{socket.gethostname()}\n")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert decoded(capsys, "--ckpt", ckpt, "--output", out, "--resume", file)[0] == 0
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "a.wav", name, *left, "said", "shown"]

@pytest.mark.parametrize("mark", [None, "", "."])
def test_a_line_of_a_part_gives_its_outcome_back_and_a_finished_one_no_text_without_marks(tmp_path, mark):  # C182
    """mark: what punctuation put behind the word; None: there was none."""
    word = report.Word("ab", 0.1, 0.2, 0.9)
    written = word._replace(text=f"ab{mark}")
    found = None if mark is None else (report.Sentence(written.text, 0.1, 0.2, [written]),)
    result = report.Result("ab", 0.9, [report.Token("ab", 5, 0.9, 0.1, 0.2)], [word], sentences=found)
    outcome = report.Outcome(1, "k", 0.5, "ab", result)
    output = outputs.Output("json", outputs.numbered(["k", "k"]), made={"ckpt": "x"})
    line = outputs.part_line(output, outcome)
    with open("/dev/full", "ab", buffering=0) as full, pytest.raises(OSError, match="28.*'/dev/full'"):
        outputs.write_outcomes(output._replace(part=full), [outcome])
    assert json.loads(line)["number"] == 1
    back, row = outputs.read_outcome(line, "part")
    assert row["made"] == {"ckpt": "x"}
    assert (back.key, back.seconds, back.reference, back.result.text, back.result.tokens) == (
        "k", 0.5, "ab", "ab", result.tokens)
    output = output._replace(merged=tmp_path / "x.jsonl", part=outputs.open_part(tmp_path / "x.jsonl.part"))
    outputs.write_outcomes(output, [outcome])
    outputs.merge_parts(output, keep=True)
    final = (tmp_path / "x.jsonl").read_bytes()
    assert final == report.FORMS["json"](outcome).encode()
    assert outputs.read_outcome(final, "end")[0].reference == ("ab" if mark is None else "")
    (tmp_path / "x.jsonl.part1").write_text("{junk\n")
    refused("x.jsonl.part1, byte 0: wanted a result", outputs.merge_parts, output, False)
    (tmp_path / "x.jsonl.part").unlink()
    refused("x.jsonl.part: removed while it was written", outputs.end_output, output, False, 1)

def test_a_part_goes_on_with_what_it_was_made_with_and_nothing_else(ckpt, tmp_path, capsys, monkeypatch):  # C182
    file, out, words = spoken(tmp_path / "a.wav", 0.5), tmp_path / "out.jsonl", tmp_path / "words"
    words.write_text("ab")
    with monkeypatch.context() as patch:
        patch.setattr(outputs, "merge_parts", lambda output, keep: None)
        decoded(capsys, "--ckpt", ckpt, "--output", out, file)
    part = (tmp_path / "out.jsonl.part").read_bytes()
    (tmp_path / "out.jsonl.part1").write_text("no result\n")
    assert "out.jsonl.part1, byte 0: wanted a result" in refusal(
        capsys, "--ckpt", ckpt, "--output", out, "--resume", file)
    (tmp_path / "out.jsonl.part1").unlink()
    other = saved(tiny_system(encoder={"ffn_dim": 8}), tmp_path / "other.pt")
    for name, more in (("min-segment-sec", ["--min-segment-sec=2"]), ("max-segment-sec", ["--max-segment-sec=10"]),
                       ("ckpt", ["--ckpt", other])):
        error = refusal(capsys, "--ckpt", ckpt, "--output", out, "--resume", file, *more)
        assert error.startswith(f"decode.py: --{name}: wanted ") and "to start over, remove that file" in error
        assert (tmp_path / "out.jsonl.part").read_bytes() == part
    moved = shutil.copy(ckpt, tmp_path / "moved.pt")
    more = ["--batch-size=1", "--threads=1", "--resume", "--limit=1"]
    assert decoded(capsys, "--ckpt", moved, "--output", out, file, *more)[:2] == (0, [])
    assert "made" not in out.read_text()
    options = decode_options.parse_arguments(["--hotwords", str(words), "--vad", str(tmp_path)])
    assert outputs.made_with(options)["hotwords"] == outputs.digest(str(words)) != outputs.digest(file)
    no_matter = {"inputs", "export", "allow_pipes", "output", "format", "resume", "report", "plot", "explain", "device",
                 "stream", "pcm", "limit", "threads", "plot_layer", "batch_size", "batch_seconds", "search"}
    assert vars(options).keys() - no_matter == {*outputs.made_with(options), "punctuate"}  # "punctuate" is not given

@pytest.mark.parametrize("console", CONSOLES)
def test_a_console_that_is_closed_full_or_gone_loses_no_result(ckpt, zygote, tmp_path, console):  # C181
    for i in range(9):
        spoken(tmp_path / "in" / f"{i}.wav", 0.5)
    argv = ["--device=cpu", "--batch-size=2", "--ckpt", ckpt, tmp_path / "in"]
    whole = {"script": "decode", "first": CONSOLES[console] + AS_SCRIPT}
    assert zygote.wait(zygote.start(os.devnull, *argv, "--output", tmp_path / "out.jsonl", **whole)) == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 9
    if console == "full":  # nobody else has the results
        whole["first"] = CONSOLES[console].partition("; ")[0] + AS_SCRIPT
        assert zygote.wait(zygote.start(tmp_path / "said", *argv, **whole)) == 2
        error = (tmp_path / "said").read_text()
        assert "standard output: [Errno 28]" in error and "Traceback" not in error

def test_the_first_process_writes_the_file_unless_it_was_interrupted(tmp_path, capsys, monkeypatch):  # C182
    kept = []
    monkeypatch.setattr(outputs, "merge_parts", lambda output, keep: kept.append((output.rank, keep)))
    for rank, processes in ((0, 1), (0, 2), (1, 2)):
        for interrupted in (False, True):
            outputs.end_output(outputs.Output("json", merged=tmp_path / "x", rank=rank), interrupted, processes)
    outputs.end_output(outputs.Output("json"), True, 1)
    assert kept == [(0, False), (0, True), (0, False)] and capsys.readouterr().err.count("interrupted; ") == 2

def test_what_lies_beside_a_recording_under_its_name_is_never_replaced(ckpt, tmp_path, capsys):  # C73
    for form in ("txt", "srt"):
        folder = tmp_path / form / "sub"
        spoken(folder / "a.wav", 0.5)
        spoken(folder / "b.wav", 0.5)
        human = folder / f"b.{form}"
        human.write_text("what a person heard")
        arguments = ["--ckpt", ckpt, "--format", form, "--output", folder, folder]
        code, lines, error = decoded(capsys, *arguments)
        assert (code, lines) == (2, []) and f"{human} lies beside the recording of its name" in error
        assert decoded(capsys, *arguments, "--resume")[0] == 0
        assert human.read_text() == "what a person heard" and (folder / f"a.{form}").exists()
        assert decoded(capsys, "--ckpt", ckpt, "--format", form, "--output", tmp_path / "else", folder)[0] == 0

def test_one_input_may_have_one_file_and_several_have_a_folder(ckpt, tmp_path, capsys):  # C73
    files = [spoken(tmp_path / f"{i}.wav", 0.5) for i in range(2)]
    for form in ("txt", "json", "srt", "vtt", "tsv", "ctm"):
        out = tmp_path / f"very/deep/{form}/talk.{form}"
        assert decoded(capsys, "--ckpt", ckpt, files[0], "--output", out)[0] == 0
        (outcome,) = recognised(tiny_system(), files[0])
        assert out.read_text() == report.FORMS[form](outcome._replace(key=files[0]))
        other = tmp_path / f"two.{form}"
        if form != "ctm":  # which is one file for all
            error = refusal(capsys, "--ckpt", ckpt, *files, "--output", other, "--format", form)
            assert error.startswith("decode.py: --output: wanted a folder") and not other.exists()
    arguments = ["--ckpt", ckpt, files[0], "--output", tmp_path / "x.srt", "--format", "txt"]
    assert "wanted a folder or a file that ends in .txt" in refusal(capsys, *arguments)
    assert "wanted a folder or a file that ends in .json, got " in refusal(capsys, *arguments[:3], "--output", files[0])
    for option in ("--report", "--plot"):       # which would be found out when all is recognised
        with pytest.raises(SystemExit):
            decode.parse_arguments([option, files[0]])
        assert capsys.readouterr().err.endswith(f": {option}: wanted a folder, got the file {files[0]}\n")
    (tmp_path / "x.srt").mkdir()
    assert decoded(capsys, *arguments)[0] == 0 and os.listdir(tmp_path / "x.srt") == ["0.txt"]

def test_limit_threads_and_the_real_time_factor_are_what_they_say(ckpt, tmp_path, capsys, monkeypatch):
    files = [spoken(tmp_path / f"{i}.wav", 0.5) for i in range(5)]
    clock = itertools.count(2.0, 0.75)  # seconds at which it is looked: the run's start and end
    monkeypatch.setattr(decode, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    for limit, count in ((2, 2), (5, 5), (6, 5), (0, 5)):
        _, lines, error = decoded(capsys, "--ckpt", ckpt, *files, "--limit", limit, "--threads", 3 + limit)
        assert [key for key, _ in lines] == files[:count] and torch.get_num_threads() == 3 + limit
        factor = 0.75 / (0.5 * count)
        assert error == (f"{count} utterances, {0.5 * count:.1f} s of audio in 0.75 s, real-time factor "
                         f"{factor:.4f}; 0 could not be recognised\n")
    (tmp_path / "bad.wav").write_bytes(b"junk")
    assert "0 utterances, 0.0 s of audio in 0.75 s; 1 could not" in decoded(
        capsys, "--ckpt", ckpt, tmp_path / "bad.wav")[2]

def test_options_of_the_system_reach_it(ckpt, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "runs_on", lambda precision, device: True)
    arguments = decode_options.parse_arguments(["--dtype=bfloat16", "--batch-size=3", "--batch-seconds=7",
                                                "--min-segment-sec=2", "--max-segment-sec=9"])
    assert arguments.ckpt == "runs/latest/checkpoints/best.pt"
    system = decode.greedy_system(arguments, ckpt)
    assert (system.precision, system.batch_size, system.batch_seconds, system.segment_sec) == (
        "bfloat16", 3, 7.0, (2.0, 9.0))
    assert "wanted auto, cpu or" in refusal(capsys, "--ckpt", ckpt, "a.wav", "--device=tpu")

def test_a_run_needs_its_standard_output_where_nothing_else_keeps_the_results(ckpt, tmp_path, capsys, monkeypatch):
    asked = []

    def spy(outcomes, own, alone, encode):
        asked.append((own, alone))
        return outputs.Tally([], 0, [], None)

    monkeypatch.setattr(decode, "print_results", spy)
    file = spoken(tmp_path / "a.wav", 0.5)
    for more in ([], ["--output", tmp_path / "o"], ["--report", tmp_path], ["--plot", tmp_path], ["--explain"]):
        assert decoded(capsys, "--ckpt", ckpt, file, *more)[0] == 0
    assert decoded(capsys, "--ckpt", saved(tiny_system("toy"), tmp_path / "toy.pt"), "--limit=1")[0] == 0
    assert asked == [(False, True)] + [(False, False)] * 4 + [(True, True)]

def test_of_several_processes_none_reads_standard_input_and_the_first_exports(ckpt, tmp_path, capsys, monkeypatch):
    made = []
    monkeypatch.setattr(decode, "export", lambda system, path: made.append(path))
    monkeypatch.setattr(decode, "export_int8", lambda path, target: made.append(target))
    for rank in (0, 1):
        monkeypatch.setattr(decode, "join_processes", lambda timeout: (rank, 2 * timeout.days))
        for arguments in (["-"], ["--stream", "a.wav"]):
            assert "2 processes cannot share standard input" in refusal(capsys, "--ckpt", ckpt, *arguments)
        for precision in ("float32", "int8"):
            assert decoded(capsys, "--ckpt", ckpt, "--dtype", precision, "--export", f"{rank}.{precision}")[0] == 0
    assert made == ["0.float32", "0.int8"]
    monkeypatch.setattr(decode, "join_processes", lambda timeout: (0, 1))
    more = ["--dtype=int8", "--export=2.int8", spoken(tmp_path / "a.wav", 0.5)]
    assert len(decoded(capsys, "--ckpt", ckpt, *more)[1]) == 1 and made[2:] == ["2.int8"]

def test_ctrl_c_while_a_window_is_written_comes_when_it_is_written(ckpt, tmp_path, capsys, monkeypatch):  # C120
    out = tmp_path / "out.jsonl"
    files = [spoken(tmp_path / f"{i}.wav", 0.5) for i in range(5)]
    everything = decoded(capsys, "--ckpt", ckpt, *files)[1]
    monkeypatch.setattr(decode, "WINDOW", 3)
    monkeypatch.setattr(outputs, "json_row", lambda outcome: outcome.index == 0 and os.kill(os.getpid(), signal.SIGINT)
                        or report.json_row(outcome))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever ran before
    assert decoded(capsys, "--ckpt", ckpt, *files, "--output", out)[:2] == (130, everything[:3])
    assert [json.loads(line)["key"] for line in out.read_text().splitlines()] == files[:3]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

def test_times_end_with_the_recording_where_frames_are_stacked(tmp_path):  # C121
    """6 frames are one, and what is missing of the last one is up to 50 ms behind the end of the samples."""
    system, beyond = tiny_system(lfr_n=6), 0
    for seconds in 0.4 + 0.03 * np.arange(12):
        path = spoken(tmp_path / "a.wav", seconds)
        feats = audio.frontend(*audio.load_wav(path), system.config.data, system.stats)
        free, [bound] = decode.transcribe(system, [feats])[0], recognised(system, path)
        beyond += free.tokens[-1].end > seconds
        for result in (bound.result, decode.transcribe_recording(system, path)):
            for was, now in zip(free.tokens + free.words, result.tokens + result.words, strict=True):
                assert now.end == min(was.end, seconds) and now.start == min(was.start, seconds)
    assert beyond

def test_batches_stay_within_batch_seconds_and_windows_keep_the_order(ckpt, tmp_path, capsys, monkeypatch):  # C77
    files = [spoken(tmp_path / f"{i}.wav", seconds) for i, seconds in enumerate((0.9, 0.3, 0.6, 0.25, 0.8, 0.4, 0.7))]
    wanted = decoded(capsys, "--ckpt", ckpt, *files)[1]
    sizes = batches_seen(monkeypatch)
    monkeypatch.setattr(decode, "WINDOW", 4)
    assert decoded(capsys, "--ckpt", ckpt, *files, "--batch-seconds", "0.8")[1] == wanted
    assert sizes == [[23, 28], [58], [88], [38], [68], [78]]     # frames; 80 fit, and no batch spans two windows

@pytest.mark.parametrize("seconds, count", [(116 * 0.01, 1), (117 * 0.01, 0)])
def test_weights_are_laid_out_for_audio_that_is_long(ckpt, tmp_path, capsys, monkeypatch, seconds, count):  # C140
    """Of 0.9 and 0.3 s, which have 88 and 28 frames."""
    files, calls = [spoken(tmp_path / f"{sec}.wav", sec) for sec in (0.9, 0.3)], []
    monkeypatch.setattr(decode, "LAID_OUT_SEC", seconds)
    monkeypatch.setattr(decode, "lay_out_products", lambda system: calls.append(system.precision))
    decoded(capsys, "--ckpt", ckpt, *files)
    assert calls == ["float32"] * count

def test_the_shares_of_two_processes_are_the_whole_in_order(tmp_path, monkeypatch):  # C76
    """What the second process sends is kept, and the first gets it."""
    system, sent = tiny_system()._replace(batch_size=2), []
    paths = [spoken(tmp_path / f"{i}.wav", 0.2 + 0.37 * i % 1.1) for i in range(11)]
    dataset = decode.open_inputs(system, paths, tmp_path)
    monkeypatch.setattr(decode, "WINDOW", 7)

    def summed(sums):
        if shard == (1, 2):
            sent.append(sums)
            return sums
        return ranks.sum_by_name(sums, sent.pop(0))

    monkeypatch.setattr(decode, "sum_over_ranks", summed)
    outcomes = {}
    for shard in ((0, 1), (1, 2), (0, 2)):
        windows = decode.plan_batches(range(11), dataset.lengths(), system)
        outcomes[shard] = list(decode.recognise_all(system, dataset, windows, shard, lambda done: None))
    assert outcomes[0, 2] == outcomes[0, 1] and outcomes[1, 2] == sent == []
    assert [outcome.index for outcome in outcomes[0, 1]] == list(range(11))

@slow
def test_torchrun_with_two_processes_writes_what_one_writes(ckpt, tmp_path):  # C76
    rows = [{"audio": spoken(tmp_path / f"{i}.wav", 0.2 + 0.37 * i % 1.1), "text": "ab c" * (i % 3)} for i in range(15)]
    (tmp_path / "4.wav").write_bytes(b"junk")
    write_manifest(tmp_path / "dev.jsonl", rows)
    for name, launcher in (("one", [sys.executable]), ("two", TORCHRUN)):
        command = [*launcher, HERE / "decode.py", "--device=cpu", "--threads=1", "--batch-size=2", "--ckpt", ckpt,
                   "--output", tmp_path / f"{name}.jsonl", "--report", tmp_path / name, tmp_path / "dev.jsonl"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 1 and done.stderr.count(" could not be recognised") == 1, done.stderr
        (tmp_path / f"{name}.txt").write_text(done.stdout)
    for file in ("one.txt", "one.jsonl", "one/summary.txt", "one/alignments.txt"):
        assert (tmp_path / file).read_text() == (tmp_path / file.replace("one", "two", 1)).read_text() != ""
    assert (tmp_path / "one.txt").read_text().count("\n") == 14

def end_first(zygote: Zygote, folder: Path, number: int, script: str, *argv) -> list[int]:
    """Send a signal to the first of two processes, both of which are held -> their exit codes."""
    held = [folder / "held0", folder / "held1"]
    pids = zygote.start_ranks(folder / "log", 2, *argv, script=script, held=folder / "held")
    wait_until(lambda: all(path.is_dir() for path in held))
    os.kill(pids[0], number)
    for path in held:
        path.rmdir()
    return [zygote.wait(pid) for pid in pids]

@slow
def test_two_processes_whose_first_is_ended_go_on_and_lose_nothing(ckpt, zygote, tmp_path):  # C182
    """Ended twice, by SIGTERM and by SIGKILL."""
    rows = [{"audio": spoken(tmp_path / f"{i % 7}.wav", 0.3 + i % 7 / 10), "text": "ab", "key": f"{i}"}
            for i in range(60)]
    manifest, out = write_manifest(tmp_path / "m.jsonl", rows), tmp_path / "out.jsonl"
    options = ["--device=cpu", "--threads=1", "--batch-size=1", "--ckpt", ckpt, manifest]
    for number, more in ((signal.SIGTERM, []), (signal.SIGKILL, ["--resume"])):
        assert 0 not in end_first(zygote, tmp_path, number, "decode", "--output", out, *more, *options)
        assert not out.exists()
    error = zygote.run(tmp_path / "log", "--output", out, "--resume", *options, script="decode", world=2)
    assert 4 <= int(re.search(r"going on: (\d+) of 60", error)[1]) < 60, error
    zygote.run(tmp_path / "log", "--output", tmp_path / "one.jsonl", *options, script="decode")
    assert out.read_text() == (tmp_path / "one.jsonl").read_text() and not list(tmp_path.glob("out.jsonl.*"))

@slow
def test_a_run_of_two_processes_whose_first_is_ended_goes_on_as_if_nothing_was(zygote, tmp_path):  # C83
    """Ended twice, by SIGTERM and by SIGKILL."""
    argv = [tiny_yaml(tmp_path / "tiny.yaml"), "--training.threads=1", "--training.num_epochs=4",
            "--training.checkpoint_steps=1", "--model.encoder.dropout=0.2"]
    zygote.run(tmp_path / "out", *argv, "--runs", tmp_path / "whole", world=2)
    latest, steps = tmp_path / "runs/latest", []
    for number, more in ((signal.SIGTERM, [*argv, "--runs", tmp_path / "runs"]),
                         (signal.SIGKILL, ["--resume", latest])):
        end_first(zygote, tmp_path, number, "train", *more)
        steps.append(read_checkpoint(latest / "checkpoints/latest.pt")["progress"]["step"])
    assert 7 <= steps[0] < steps[1] < 18
    zygote.run(tmp_path / "out", "--resume", latest, world=2)
    assert_same_run(run_of(tmp_path / "runs"), run_of(tmp_path / "whole"))

def test_a_terminal_is_told_how_many_inputs_are_done_and_nothing_else_is(ckpt, tmp_path, capsys, monkeypatch):
    files = [spoken(tmp_path / f"{i}.wav", 0.5) for i in range(3)]
    plain = decoded(capsys, "--ckpt", ckpt, *files, "--batch-size=2")
    assert plain[2].count("\n") == 1 and "\r" not in plain[2]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    _, texts, error = decoded(capsys, "--ckpt", ckpt, *files, "--batch-size=2")
    assert texts == plain[1] and re.fullmatch(r"(\r\x1b\[K)+2/3\r\x1b\[K3/3(\r\x1b\[K)+3 utterances, .*\n", error)

# ---- decode: long recordings ----

def long_wav(path: Path, seconds: float = 12.0) -> str:
    """Noise that comes and goes, for tiny_system."""
    rng = np.random.default_rng(4)
    plan = [(float(sound), 0.45) for sound in rng.uniform(0.3, 2.0, int(seconds))]
    audio.save_wav(path, talk(rng, plan, -60.0)[:round(8000 * seconds)], 8000)
    return str(path)

@pytest.mark.parametrize("limits, sizes", [({}, {1, 2}), ({"batch_size": 1}, {1}), ({"batch_seconds": 0.1}, {1})])
def test_segments_of_a_long_recording_are_batched_within_the_limits(tmp_path, monkeypatch, limits, sizes):
    system, found = tiny_system(), batches_seen(monkeypatch)
    pieces = list(cut_at_pauses(audio.stream(long_wav(tmp_path / "a.wav"), 8000), 8000, 0.5, 3.0))
    assert (len(list(decode.transcribe_segments(system._replace(**limits), pieces))) == len(pieces)
            == sum(map(len, found)))
    assert set(map(len, found)) == sizes

def test_a_long_recording_is_its_segments_one_by_one_in_its_own_times(tmp_path, monkeypatch):  # C80
    system, path = tiny_system(), long_wav(tmp_path / "a.wav")
    pieces = list(cut_at_pauses(audio.stream(path, 8000), 8000, 0.5, 3.0))
    monkeypatch.setattr(decode, "POOL_SEC", 4.0)        # three pools
    parts = list(decode.transcribe_segments(system._replace(batch_size=2), pieces))
    assert [start for start, _ in parts] == [piece.start_sec for piece in pieces] and len(parts) > 5
    tokens, log_probs = [], []
    for piece, (_, part) in zip(pieces, parts):
        alone = decode.transcribe(system, [audio.frontend(piece.samples, 8000, system.config.data, system.stats)])[0]
        assert [t.id for t in part.tokens] == [t.id for t in alone.tokens]
        shift = [t._replace(start=t.start + piece.start_sec, end=t.end + piece.start_sec) for t in alone.tokens]
        if tokens and shift and " " not in (tokens[-1].token, shift[0].token):
            tokens.append(report.Token(" ", 4, 1.0, tokens[-1].end, shift[0].start))
        tokens, log_probs = tokens + shift, log_probs + [math.log(t.confidence) for t in alone.tokens]
    whole = decode.transcribe_recording(system._replace(segment_sec=(0.5, 3.0)), path)
    assert whole.text == "".join(t.token for t in whole.tokens) and len(whole.tokens) > 40
    assert all(sec == round(sec, 3) for item in whole.tokens + whole.words for sec in (item.start, item.end))
    for ours, wanted in zip(whole.tokens, tokens, strict=True):
        assert (ours.token, ours.id) == (wanted.token, wanted.id)
        assert (ours.confidence, ours.start, ours.end) == pytest.approx(wanted[2:5], abs=2e-3)
    assert whole.confidence == pytest.approx(math.exp(sum(log_probs) / len(log_probs)), abs=1e-3)
    assert whole.confidence == round(whole.confidence, 4) and decode.join_results(system, []).confidence == 0.0
    alone = decode.transcribe(system, [audio.frontend(*audio.load_wav(path), system.config.data, system.stats)])[0]
    assert decode.transcribe_recording(system, Path(path).read_bytes()) == alone       # one piece

@pytest.mark.parametrize("unit, texts, wanted", [
    ("word", [["ab", "你"], [], ["好"]], "ab 你 好"), ("char", ["ab c", "cd"], "ab c cd"), ("char", ["ab ", "cd"], "ab cd"),
    ("char", [" ", "cd", "a"], " cd a"), ("char", ["你 好", "世", "ab"], "你 好世ab"),
    ("char", ["ab", "b"], "abb"),                               # a vocabulary without a space
    ("piece", [["你", "ab@@"], ["it", "is"], ["世", "ef"]], "你ab it is世ef")])
def test_segments_are_joined_as_their_language_is_written(unit, texts, wanted):  # C80
    known = (*SPECIALS, *dict.fromkeys(symbol for text in texts for symbol in text))
    speller = PieceTokenizer(known, None) if unit == "piece" else Tokenizer(unit, known)
    parts = [(10.0 * i, planted_words(text, speller)) for i, text in enumerate(texts)]
    found = decode.join_results(tiny_system()._replace(tokenizer=speller), parts)
    assert found.text == wanted and report.join_words(found.words) == wanted.strip()
    said = [token._replace(start=token.start + start, end=token.end + start) for start, part in parts
            for token in part.tokens]
    added = [token for token in found.tokens if token not in said]
    assert [token for token in found.tokens if token not in added] == said
    assert all((token.token, token.confidence) == (" ", 1.0) for token in added)
    assert [(word.text, word.start) for word in found.words] == [
        (word.text, word.start + start) for start, part in parts for word in part.words]
    logs = [math.log(token.confidence) for token in said]
    assert found.confidence == pytest.approx(math.exp(sum(logs) / len(logs)), abs=2e-4)
    if unit == "char":
        assert "".join(token.token for token in found.tokens) == wanted

def test_long_recordings_are_decoded_in_pools_and_never_loaded_whole(ckpt, tmp_path, capsys, monkeypatch):  # C81
    long = long_wav(tmp_path / "l.wav")
    spoken(tmp_path / "s.wav", 1.0)
    broken = struct.pack("<f", 0.1) * 60000 + struct.pack("<f", math.nan)
    (tmp_path / "broken.wav").write_bytes(wav(broken, 3, 32, 1))
    wanted = decode.transcribe_recording(tiny_system()._replace(segment_sec=(0.5, 2.0)), long)
    manifest = write_manifest(tmp_path / "m.jsonl", [{"audio": "l.wav", "text": wanted.text}, {"audio": "broken.wav"},
                                                     {"audio": "s.wav", "text": ""}])
    read, sizes = audio.read_samples, []
    monkeypatch.setattr(audio, "CHUNK_SEC", 1)
    monkeypatch.setattr(audio, "read_samples", lambda *where: sizes.append(len(x := read(*where))) or x)
    arguments = ["--ckpt", ckpt, "--min-segment-sec=0.5", "--max-segment-sec=2", f"--output={tmp_path / 'o.jsonl'}"]
    assert decode.main([*arguments, str(manifest)]) == 1
    err = capsys.readouterr().err
    assert "broken.wav: wanted finite samples, got nan at sample 60000" in err and "%WER 0.00" in err
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [row["key"] for row in rows] == ["l", "s"] and rows[0]["duration"] == 12.0
    assert rows[0]["tokens"] == [report.token_entry(t) for t in wanted.tokens] and max(sizes) < 8200
    pieces = Segment(0.0, torch.randn(8000)), Segment(1.0, torch.randn(8000).index_fill(0, torch.tensor([7900]), 3e38))
    refused("features not finite", list, decode.transcribe_segments(tiny_system(), pieces))

def test_segments_are_read_no_further_ahead_than_a_pool(monkeypatch):  # C81
    monkeypatch.setattr(decode, "POOL_SEC", 3.0)
    read = []
    pieces = (read.append(i) or Segment(float(i), torch.randn(8000)) for i in range(20))
    for done, _ in enumerate(decode.transcribe_segments(tiny_system(), pieces)):
        assert len(read) == 3 * (done // 3 + 1) + 1 or len(read) == 20  # with the one that the next begins with
    assert done == 19

# ---- decode: voice activity and punctuation ----

@functools.lru_cache
def pipeline_system(variant: str) -> checkpoint.System:
    return kit_system(variant)._replace(vad=kit_vad(), punctuation=kit_punctuation("punc"))

def kit_wav(folder: Path, name: str) -> Path:
    audio.save_wav(folder / f"{name}.wav", long_samples(name), 16000)
    return folder / f"{name}.wav"

@pytest.mark.parametrize("variant", ["bicif", "seaco", "sanm", "conformer", "contextual"])
def test_sentences_hold_the_words_with_their_own_times(tmp_path, capsys, variant):  # C177
    path, out = kit_wav(tmp_path, "talk_a"), tmp_path / "out.jsonl"
    options = ["--ckpt", kit(variant), "--vad", kit("vad"), path]
    [plain] = json_rows(out, *options)
    capsys.readouterr()
    [row] = json_rows(out, *options, "--punctuate", kit("punc"))
    assert capsys.readouterr().out == f"{path}\t{row['text']}\n"
    assert plain["words"] == row["words"] and plain["tokens"] == row["tokens"] and "sentences" not in plain
    words = [word for sentence in row["sentences"] for word in sentence["words"]]
    assert [(w["start"], w["end"]) for w in words] == [(w["start"], w["end"]) for w in row["words"]] and len(words) > 20
    assert [w["word"].rstrip("，。？、,.?").lower() for w in words] == [w["word"].lower() for w in row["words"]]
    wanted, _ = punctuation.punctuate(kit_punctuation("punc"), " ".join(w["word"] for w in row["words"]))
    assert row["text"] == wanted.strip()
    for sentence in row["sentences"]:
        assert sentence["text"][-1] in "。？.?" and not re.search("[。？][^>]", sentence["text"])
        assert (sentence["start"], sentence["end"]) == (sentence["words"][0]["start"], sentence["words"][-1]["end"])
    segments = list(vad.segments_of(kit_vad(), [long_samples("talk_a")]))
    margin = 0.07  # the stacked frames at the edges
    for token in row["tokens"]:
        assert any(begin / 1000 - margin <= token["start"] <= end / 1000 + margin for begin, end in segments)

def test_punctuation_alone_writes_every_form(tmp_path, capsys):  # C177
    path = kit_wav(tmp_path, "talk_b")
    for form in ("txt", "srt", "vtt", "tsv", "json"):
        assert decoded(capsys, "--ckpt", kit("sanm"), "--punctuate", kit("punc"), "--output", tmp_path,
                       "--format", form, path)[0] == 0
    row = json.loads((tmp_path / "talk_b.json").read_text())
    assert (tmp_path / "talk_b.txt").read_text() == row["text"] + "\n"
    cues = re.findall(r"-->.*\n(.+)\n", (tmp_path / "talk_b.srt").read_text())
    assert len(cues) >= len(row["sentences"]) > 3 and "".join(cues).replace(" ", "") == row["text"].replace(" ", "")
    assert re.findall(r"-->.*\n(.+)\n", (tmp_path / "talk_b.vtt").read_text()) == cues
    assert (tmp_path / "talk_b.tsv").read_text().count("\n") == len(cues) + 1

@pytest.mark.parametrize("name", ["paraformer", "transformer", "ctc"])
def test_own_models_take_both(tmp_path, name):  # C177
    options = ["--ckpt", saved(tiny_system(name=name), tmp_path / "tiny.pt"),
               "--vad", kit("vad"), "--punctuate", kit("punc")]
    row, empty = json_rows(tmp_path / "out.jsonl", *options, kit_wav(tmp_path, "talk_a"), kit_wav(tmp_path, "silence"))
    assert empty["text"] == "" and empty["sentences"] == []
    segments = list(vad.segments_of(kit_vad(), [long_samples("talk_a")]))
    assert row["words"] and all(any(begin / 1000 <= word["start"] and word["end"] <= end / 1000
                                    for begin, end in segments) for word in row["words"])
    assert len(row["sentences"]) > 1 and [w["start"] for s in row["sentences"] for w in s["words"]] == [
        w["start"] for w in row["words"]]

def test_error_rates_are_those_without_punctuation(tmp_path, capsys):
    path = kit_wav(tmp_path, "talk_b")
    row = {"audio": str(path), "text": decode.transcribe_recording(kit_system("sanm"), path).text}
    manifest = write_manifest(tmp_path / "a.jsonl", [row])
    code, lines, error = decoded(capsys, "--ckpt", kit("sanm"), "--punctuate", kit("punc"), manifest)
    assert code == 0 and "。" in lines[0][1] and "%CER 0.00 [" in error

@pytest.mark.parametrize("schedule, run", [("config", "no_dynamic"), ("funasr", "default")])
def test_the_schedule_is_a_named_option(tmp_path, capsys, monkeypatch, schedule, run):
    heard = []

    def spy(system, pieces):
        heard.extend(round(piece.start_sec * 1000) for piece in pieces)
        return iter([])

    monkeypatch.setattr(decode, "transcribe_segments", spy)
    path = kit_wav(tmp_path, "long")
    assert decoded(capsys, "--ckpt", kit("sanm"), "--vad", kit("vad"), "--vad-schedule", schedule, path)[0] == 0
    assert heard == [begin for begin, _ in vad_results("offline")[run]["value"]["long"]]

# ---- decode: FunASR's own results of the three models together ----

def funasr_words(tokens: list[report.Token]) -> list[SpelledWord]:
    """A segment's words and times in ms as FunASR makes them, which loses and glues what breaks off (his@@ 不)."""
    spoken = [token for token in tokens if token.token not in UNSPOKEN]
    all_han = all(_is_han(token.token) for token in spoken)
    words, held, waiting, after_word = [], "", None, False
    for token, timed in zip(spoken, tokens):
        kind = "han" if all_han else _kind(token.token)
        start, end = round(timed.start * 1000), round(timed.end * 1000)
        if kind == "piece":
            held += token.token.replace(PIECE, "")
            waiting = (waiting[0] if waiting else start, end)
            after_word = False
        elif kind == "word":
            words.append(SpelledWord(held + token.token, waiting[0] if waiting else start, end, "word"))
            held, waiting, after_word = "", None, True
        elif kind == "han":
            glued = not words or words[-1].kind != "word" or after_word
            if after_word and words[-1].kind == "other":
                words.pop()
                glued = False
            words.append(SpelledWord(token.token, *(waiting or (start, end)), "han" if glued else "other"))
            waiting, after_word = None, False
        else:
            words.append(SpelledWord(token.token, None, None, "other"))
    return merge_letters(words)

def funasr_merged(segments: list, most_ms: int) -> list:
    """merge_vad."""
    times = sorted({time for segment in segments for time in segment})
    if len(segments) < 2:
        return segments
    found, begin = [], 0
    for time, after in itertools.pairwise(times):
        if after - begin >= most_ms:
            if time > begin:
                found.append((begin, time))
            begin = time
    return [*found, (begin, times[-1])]

def funasr_sentences(words: list[str], marks: list[int], stamps: list, options: dict) -> list[dict]:
    """sentence_info, where there are as many marks as timestamps."""
    english = options.get("en_post_proc", False)
    signs = ", . ? ,".split() if english else "，。？、"
    found, text, raw, times = [], "", [], []
    for word, mark, stamp in zip([*words, *[""] * len(marks)], marks, stamps):
        spaced = word and (re.match("[a-zA-Z]", word) or re.search("[a-zA-Z]$", text))
        text += " " * bool(spaced) + word
        raw += [word] if word else []
        times.append(stamp)
        if mark > 1:
            text += signs[mark - 2]
            entry = {"text": text.lstrip(" ") if english else text, "start": times[0][0], "end": times[-1][1],
                     "timestamp": times}
            if options.get("return_raw_text"):
                entry["raw_text"] = (" " if english else "").join(raw)
            found.append(entry)
            text, raw, times = "", [], []
    return found

def funasr_result(system: checkpoint.System, samples: torch.Tensor, build: dict, options: dict) -> tuple[dict, list]:
    """What AutoModel(...).generate(...) returns of a recording, without its key, from our parts alone; and its
    sentences without the words of two segments in one where they meet."""
    whole = [(0, len(samples) / 16)]
    times = list(vad.segments_of(system.vad, [samples])) if system.vad else whole
    timed = system.config.model.predictor.upsampling > 0
    if not times:
        return {"text": "", "timestamp": []}, []
    if options.get("merge_vad"):
        times = funasr_merged(times, 1000 * build.get("merge_length_s", 15))
    pieces = [Segment(begin / 1000, samples[round(16 * begin):round(16 * end)]) for begin, end in times]
    texts, stamps, entries = [], [], []
    for (begin, end), (start, result) in zip(times, decode.transcribe_segments(system, pieces)):
        words = funasr_words(result.tokens)
        if not result.tokens and system.config.model.name == "seaco":
            return {"text": "", "timestamp": []}, []
        text = words[0].text if words else ""
        for before, word in itertools.pairwise(words):
            text += " " * (timed or are_spaced(before, word)) + word.text
        own = [[word.start + begin, word.end + begin] for word in words if timed and word.start is not None]
        texts.append(text)
        stamps += own
        if text:
            entries.append({"start": own[0][0] if own else begin, "end": own[-1][1] if own else end, "text": text,
                            "sentence": text, "timestamp": own})
    joined = spaced = " ".join(texts)
    asked, marks = "", None
    for text in filter(None, map(str.strip, texts)):
        meet = asked and all("\u3400" <= c <= "\u9fff" for c in (asked[-1], text[0]))
        asked += ("" if meet or not asked else " ") + text
    if system.punctuation:
        joined, marks = punctuation.punctuate(system.punctuation, asked, options.get("split_size", 20))
    found = {"text": joined} | ({"timestamp": stamps} if timed else {})
    if options.get("return_raw_text"):
        found["raw_text"] = spaced
    right = []
    if options.get("sentence_timestamp") and system.vad:
        if not system.punctuation:
            entries = [] if timed else entries
        right = entries
        if system.punctuation and len(marks or ()) == len(stamps):
            entries, right = (funasr_sentences(text.split(), marks or [], stamps, options) for text in (asked, spaced))
        found["sentence_info"] = entries
    return found, right

@needs_kit
@pytest.mark.parametrize("run", [run for run in kit_results("pipeline", "results.json") if run != "_meta"]
                                if KIT.is_dir() else [])
def test_the_three_models_together_give_funasrs_results(run):  # C179
    """Text, times, marks and sentences, key by key; also the sentences that it gives without its shift of words."""
    text = json.dumps(kit_results("pipeline", "results.json")[run])
    given = json.loads(re.sub("(?<![0-9])61720,", "61730,", text))  # a word before its segment: FunASR's only one
    build, options = given["build"], given["generate"]
    system = kit_system(given["model"])
    if given["vad"]:
        told = {key: options[key] for key in ("max_end_silence_time",) if key in options}
        system = system._replace(vad=told_vad(build.get("vad_kwargs", {}), told))
    if given["punc"]:
        system = system._replace(punctuation=kit_punctuation("punc"))
    if "hotword" in options:
        system = system._replace(hotwords=tuple(options["hotword"].split()))
    for names, outputs in given["output"].items():
        rights = given.get("sentence_info_right", {}).get(names, [None] * len(outputs))
        for output, right in zip(outputs, rights, strict=True):
            samples = long_samples(output["key"])
            wanted = {key: value for key, value in output.items() if key != "key"}
            found, sentences = funasr_result(system, samples, build, options)
            assert found == wanted, (names, output["key"])
            assert right is None or sentences == right

# ---- decode: pictures ----

def test_plots_are_written_for_utterances_with_and_without_tokens_and_hostile_names(ckpt, tmp_path, capsys):
    hostile = spoken(tmp_path / "a <&'b.wav", 1.0)
    short = spoken(tmp_path / "short.wav", 0.001)
    far = tmp_path / "/".join(["x" * 99] * 3) / "a <&'b.wav"
    far.parent.mkdir(parents=True)
    shutil.copy(hostile, far)
    assert decode.main(["--ckpt", ckpt, hostile, short, str(far), "--plot", str(tmp_path / "plots")]) == 0
    assert "--plot: no picture of 1 that --max-segment-sec cut or that have no frames\n" in capsys.readouterr().err
    files = sorted(path for path in (tmp_path / "plots").rglob("*") if path.is_file())
    names = [f"{folder}a ___b.{kind}.svg" for folder in ("", ("x" * 99 + "/") * 3)
             for kind in ("alignment", "cross", "encoder")]
    assert [str(file.relative_to(tmp_path / "plots")) for file in files] == names
    for file in files:
        title = ElementTree.fromstring(file.read_text()).find("{*}text").text
        assert (str(far) if "xxx" in str(file) else hostile)[:60] in title

def test_the_heads_of_any_layer_can_be_drawn(tmp_path, monkeypatch):  # C97
    """They are the weights that the encoder and the decoder's cross-attention give, of one utterance alone."""
    system, [feats] = tiny_system(encoder={"num_layers": 3}, decoder={"num_layers": 2}), ragged_feats([31])
    calls, aligned = [], []
    monkeypatch.setattr(report, "attention_svg", lambda *a, cross: calls.append((a, cross)) or "")
    monkeypatch.setattr(report, "alignment_svg", lambda *a: aligned.append(a[4:]) or "")
    item = data.Utterance("k", feats, torch.tensor([]), "", ints(0, 10, 31), 0.31)
    with torch.no_grad():
        encoder = system.model.encoder(feats[None], torch.tensor([31]), need_weights=True)[2]
        found = system.model.greedy(feats[None], torch.tensor([31]))
        hidden, lens = system.model.encode(feats[None], torch.tensor([31]))
        cross = system.model.cross_attention(hidden, lens, found.tokens, found.lens)
    heard = found.tokens[0] > EOS
    for layer, (i, j) in {1: (0, 0), 2: (1, 1), 3: (2, 1), 0: (2, 1), 9: (2, 1)}.items():
        calls.clear()
        decode.draw(system, item, layer)
        (ours, first), (theirs, second) = calls
        assert (first, second) == (False, True) and ours[0].startswith(f"encoder, layer {i + 1} of 3, k")
        assert torch.equal(ours[1], encoder[i][0]) and torch.equal(theirs[1], cross[j][0][:, heard])
        for seconds, span in (ours[3:], theirs[3:], aligned[-1][:2]):   # 16 encoder frames of 20 ms, the first at 0
            assert (seconds, *span) == pytest.approx((0.31, -0.005, 0.315))
        assert aligned[-1][2].tolist() == pytest.approx([0.0, 0.1, 0.31])
    monkeypatch.undo()
    options = ["--device=cpu", "--ckpt", saved(system, tmp_path / "x.pt"), "--plot", str(tmp_path), "--plot-layer=2",
               "--explain"]
    assert decode.main([*options, spoken(tmp_path / "a.wav", 0.5)]) == 0
    assert "encoder, layer 2 of 3" in (tmp_path / "a.encoder.svg").read_text() and (tmp_path / "a.explain.svg").exists()

def test_explain_draws_what_the_model_computes_of_an_utterance(tmp_path, capsys, monkeypatch):  # C159
    """Oracle: the probabilities of the decoder's output, whose first guesses are what greedy decoding gives."""
    monkeypatch.chdir(tmp_path)
    system = tiny_system()
    ckpt, wav = saved(system, tmp_path / "tiny.pt"), spoken(tmp_path / "a.wav", 1.0)
    assert decoded(capsys, "--ckpt", ckpt, "--explain", wav)[0] == 0
    root = ElementTree.parse(tmp_path / "a.explain.svg").getroot()
    texts = [e.text for e in root.iter() if e.tag.endswith("text")]
    item = decode.open_inputs(system, [wav], tmp_path)[0]
    lens = torch.tensor([len(item.feats)])
    found = system.model.greedy(item.feats[None], lens)
    count = int(found.lens[0])
    said = [u for u, id in enumerate(found.tokens[0, :count].tolist()) if id not in (BLANK, SOS, EOS)]
    title = [e.text for e in root.iter() if e.get("class") == "title"][0]
    assert len(said) > 0 and title == f"a.wav: {' '.join(system.tokenizer.symbols[found.tokens[0, u]] for u in said)}"
    for u in said:
        assert f"{math.exp(found.log_probs[0, u]):.0%}" in texts
        assert system.tokenizer.symbols[found.tokens[0, u]] in texts
    times = found.boundaries[0] * audio.frame_sec(system.config.data)
    assert [text for text in texts if text.endswith(" s")] == [f"{times[u]:.2f}–{times[u + 1]:.2f} s" for u in said]
    assert sum(e.get("class") == "fire" for e in root.iter()) == len(said) + 1
    assert sum(e.tag.endswith("image") for e in root.iter()) == 2 and f"sum {found.alpha[0].sum():.2f}" in texts
    other = replace(config.Config(), model=config.ModelConfig(name="ctc"))
    refused("--explain: wanted a Paraformer, which has firing weights, got a ctc",
            pictures.explain, nn.Linear(1, 1), other, (), None, None)

def test_a_decoder_without_layers_is_drawn_without_cross_attention(tmp_path, capsys):
    """And is decoded and reported as any other."""
    ckpt, wav = saved(tiny_system(decoder={"num_layers": 0}), tmp_path / "tiny.pt"), spoken(tmp_path / "a.wav", 1.0)
    manifest = write_manifest(tmp_path / "m.jsonl", [{"audio": wav, "text": "ab c"}])
    arguments = ["--plot", tmp_path / "plots", "--report", tmp_path / "report", "--plot-layer=1"]
    assert decoded(capsys, "--ckpt", ckpt, manifest, *arguments)[0] == 0
    assert sorted(f.name for f in (tmp_path / "plots").iterdir()) == ["a.alignment.svg", "a.encoder.svg"]

NINE_TOYS = config.ToyConfig(num_dev=9, num_symbols=8)  # utterances of the letters a to h

def test_decoding_the_toy_data_gives_the_accuracy_of_an_evaluation(tmp_path, capsys):
    system = tiny_system("toy", toy=NINE_TOYS)
    assert decode.main(["--ckpt", saved(system, tmp_path / "tiny.pt"), "--batch-size", "2"]) == 0
    out, err = capsys.readouterr()
    dataset = data.open_dataset(system.config.data, "test", system.tokenizer.encode, 0, system.stats)
    batch = data.collate([dataset[i] for i in range(9)])
    row = train.dev_figures(train.evaluate(system.model, [batch], system.tokenizer.decode))
    assert f"token accuracy {row['token_accuracy']:.4f}  sequence accuracy {row['sequence_accuracy']:.4f}  (9 " in err
    assert f"%WER {100 * row['wer']:.2f} " in err and out.count("\n") == 9 and math.isfinite(row["cer"])

def test_a_terminal_gets_ten_results_of_the_checkpoints_own_data_and_a_file_all(tmp_path, capsys, monkeypatch):  # C33
    toy = config.ToyConfig(num_dev=12, num_symbols=8)
    arguments = ["--ckpt", saved(tiny_system("toy", toy=toy), tmp_path / "tiny.pt"), "--device=cpu"]
    references = [row["reference"] for row in json_rows(tmp_path / "out.jsonl", *arguments)]
    texts = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    leader, follower = os.openpty()
    with (os.fdopen(leader) as screen, os.fdopen(follower, "w") as terminal,
          concurrent.futures.ThreadPoolExecutor(1) as pool):
        lines = pool.submit(lambda: [screen.readline().rstrip("\n") for _ in range(62)])
        monkeypatch.setattr(sys, "stdout", terminal)
        for more in (["--limit=10"], [], [spoken(tmp_path / "a.wav", 0.5)]):
            assert decode.main([*arguments, *more]) == 0
        terminal.flush()
        shown = lines.result(PATIENCE)
    wanted = []
    for (key, text), reference in zip(texts[:10], references):
        wanted += [key, f"  reference   {reference}", f"  recognised  {text}"]
    assert len(texts) == 12 and shown[:30] == shown[30:60] == wanted and shown[60].startswith("and 2 more")
    assert shown[61].startswith(f"{tmp_path / 'a.wav'}\t")  # of named inputs all

# ---- decode: streams ----

def stream_command(capsys, *argv, variant="streaming"):
    """-> exit code, standard output, standard error"""
    code = decode.main(["--device", "cpu", "--ckpt", str(kit(variant)), *map(str, argv)])
    return code, *capsys.readouterr()

@pytest.mark.parametrize("variant", STREAMING_KITS)
def test_a_file_is_decoded_by_the_chunk_loop_in_every_form(tmp_path, capsys, variant):  # C164
    """Tokens: recorded ones; the text is that of one call, and the words spell it."""
    wav = kit("wavs/aishell_dev.wav")
    case = streaming_cases(variant)["aishell_dev"][1]
    for setting, options in {"a": [], "c": ["--chunk", "8,4", "--look-back=-1,0"]}.items():
        code, out, _ = stream_command(capsys, wav, *options, "--output", tmp_path / "o.jsonl", variant=variant)
        row = json.loads((tmp_path / "o.jsonl").read_text(encoding="utf-8"))
        assert code == 0 and [token["token"] for token in row["tokens"]] == case["runs"][setting]["tokens"]
        assert out == f"{wav}\t{row['text']}\n" and row["text"] == spelled(
            [SimpleNamespace(**t) for t in row["tokens"]])
    for form in ("txt", "srt", "vtt", "tsv", "ctm"):
        assert stream_command(capsys, wav, "--output", tmp_path / form, "--format", form, variant=variant)[0] == 0
        assert len(list((tmp_path / form).iterdir())) == 1

@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_keeps_the_tokens_of_a_stream(precision):  # C164
    system = kit_system("streaming")
    samples, case = streaming_cases("streaming")["fsdd_dev_a"]
    results = listen.hear_stream(system._replace(precision=precision), samples.split(4000))
    assert [token.token for result in results for token in result.tokens] == case["runs"]["a"]["tokens"]

@CAN_INT8
@pytest.mark.parametrize("variant", STREAMING_KITS)
def test_int8_is_close_to_float32_in_a_stream(variant, monkeypatch):  # C164
    """The encoder's output within 3% (1.2 to 1.7% measured), as many tokens, most of them the same: random weights."""
    monkeypatch.setattr("packed.LARGE", 0)
    systems = kit_system(variant), checkpoint.load_system(kit(variant), "cpu", "int8")
    hidden = [outputs_of(system.model.encoder.norm, monkeypatch) for system in systems]
    for samples, _ in streaming_cases(variant).values():
        exact, found = ([token.token for result in stream_through(system, streaming.Chunk(), [samples])[0]
                         for token in result.tokens] for system in systems)
        assert len(exact) == len(found) and 2 * sum(one == other for one, other in zip(exact, found)) >= len(exact)
    for exact, found in zip(*hidden, strict=True):
        assert 0 < (exact - found).norm() < 0.03 * exact.norm()

def test_a_stream_is_printed_as_it_grows_from_a_file_and_from_a_pipe(tmp_path, capsys, monkeypatch):  # C165
    samples, rate_hz = audio.load_wav(kit("wavs/libri_dev.wav"))
    whole = stream_command(capsys, kit("wavs/libri_dev.wav"))[1].partition("\t")[2].rstrip("\n")
    assert max(map(len, listen.pieces_of(kit("wavs/libri_dev.wav"), None, 16000))) == 1600      # 0.1 s
    outs = [stream_command(capsys, "--stream", kit("wavs/libri_dev.wav"))]
    for content, options in ((wav_bytes(samples, rate_hz, 0), []),
                             (wav_bytes(samples, rate_hz)[44:], ["--pcm", rate_hz])):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BufferedReader(Trickle(content, 0))))
        outs.append(stream_command(capsys, "--stream", "-", *options))
    for code, out, err in outs:
        rows = [json.loads(line) for line in out.splitlines()]
        assert (code, err) == (0, "") and len(rows) > 5 and rows[-1]["text"] == whole
        assert all(after["text"].startswith(before["text"][:2]) for before, after in itertools.pairwise(rows))
        assert [row["tokens"] for row in rows] == [json.loads(line)["tokens"] for line in outs[0][1].splitlines()]

@pytest.mark.parametrize("variant", STREAMING_KITS)
def test_a_stream_is_written_in_sentences(capsys, variant):  # C165
    """Each is over once the next begins; from a file and as it grows, the words are those without marks."""
    def bare(text):
        return re.sub(r"\W", "", text.replace("<unk>", "")).lower()  # a mark of the kit

    wav, options = kit("wavs/libri_dev.wav"), ["--punctuate", kit("punc")]
    plain, whole = (stream_command(capsys, wav, *more, variant=variant)[1].partition("\t")[2] for more in ([], options))
    code, out, err = stream_command(capsys, "--stream", wav, *options, variant=variant)
    rows = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "") and rows[-1]["text"] != plain.strip() != whole.strip()
    assert bare(rows[-1]["text"]) == bare(plain) == bare(whole)
    assert variant != "streaming" or rows[-1]["text"] == whole.strip()
    system, written = kit_system(variant)._replace(punctuation=kit_punctuation("punc")), listen.Written()
    for row in rows:
        before = written
        written, text = listen.write_sentences(system, before, [report.Token(**token) for token in row["tokens"]])
        assert text == row["text"] and text.startswith(before.over) and len(written.over) <= len(text)
    assert len(written.over) > 9

def test_ctrl_c_ends_a_stream_with_its_last_words(capsys, monkeypatch):  # C165
    samples, rate_hz = audio.load_wav(kit("wavs/fsdd_dev_a.wav"))

    class Pressed(Trickle):
        def readinto(self, buffer):
            if not self.rest:
                raise KeyboardInterrupt
            return super().readinto(buffer)

    monkeypatch.setattr(sys, "stdin",
                        SimpleNamespace(buffer=io.BufferedReader(Pressed(wav_bytes(samples, rate_hz, 0), 0))))
    code, out, _ = stream_command(capsys, "--stream", "-")
    wanted = stream_through(kit_system("streaming"), streaming.Chunk(), [samples])[0][-1].text
    assert code == 130 and json.loads(out.splitlines()[-1])["text"] == wanted

@pytest.mark.parametrize("variant, options, words", [
    ("sanm", ["--stream", "a.wav"], "--stream: wanted a streaming model, such as paraformer-zh-streaming"),
    ("sanm", ["--chunk", "10,5", "a.wav"], "--chunk: wanted a streaming model"),
    ("streaming", ["--chunk", "10,0", "a.wav"], "wanted 1 look-ahead frame or more"),
    ("streaming", ["--batch-size", "3", "a.wav"], "--batch-size: of no use to a streaming model"),
    ("streaming", ["--beam", "3", "a.wav"],
     "a streaming model decodes greedily: leave out --beam, --nbest and penalties"),
    ("streaming", ["--stream", "--nbest", "3", "a.wav"], "a streaming model decodes greedily"),
    ("streaming", ["--plot", "x", "a.wav"], "--plot: of no use to a streaming model"),
    ("streaming", ["--vad", "x", "a.wav"], "--vad: of no use to a streaming model"),
    ("streaming", ["--hotwords", "x", "a.wav"], "--hotwords: wanted a model that can be told hotwords"),
    ("streaming", ["--stream", "nothere.wav"], "nothere.wav")])
def test_what_streaming_cannot_do_is_refused_in_a_line(capsys, variant, options, words):  # C167
    assert words in refusal(capsys, "--ckpt", kit(variant), *options)

def test_whole_utterances_are_no_business_of_a_streaming_model():  # C167
    system = kit_system("streaming")
    refused("got a streaming one", decode.decode_batch, system, [torch.zeros(30, 560)])
    with pytest.raises(ValueError, match="training.init_from=.*decoder.attention_layers: wanted 0, all layers"):
        checkpoint.adopted(replace(config.Config(), data=config.DataConfig(kind="manifest", train="x", dev="x"),
                                   training=config.TrainingConfig(init_from=str(kit("streaming_alt")))))

# ---- decode: published models, texts, times and exports ----

def test_firing_spans_equal_funasrs_timestamps():  # C44
    """Recorded: units/text.json, 40 cases, in ms behind an offset."""
    for case in unit_cases("timestamps"):
        n = len([c for c in case["chars"] if c != "</s>"])
        spans, offset = funasr.firing_spans(np.array(case["alphas"], np.float32), n), case["vad_offset"] / 1000
        assert [[int((t * 0.02 + offset) * 1000) for t in span] for span in spans] == case["timestamp"]

def test_a_token_of_the_timing_head_ends_at_its_limits():
    """What just fires; silence of 4.5 frames behind the last token and of 5.5; more tokens than can fire."""
    just = funasr.FIRED
    assert funasr.firings(np.array([just, np.nextafter(just, np.float32(0))], np.float32)).tolist() == [-1.5]
    assert funasr.firing_spans(np.array([1, 1, 0, 0], np.float32), 1) == [(-1.5, 4.0)]
    assert funasr.firing_spans(np.array([1, 1, 0, 0, 0], np.float32), 1) == [(-1.5, 2.25)]
    assert funasr.firing_spans(np.zeros(2, np.float32), 3) == [(-1.5, -0.5), (-0.5, 2.0), (2.0, 2.0)]

def test_a_token_fired_at_once_begins_at_0_and_not_before_the_recording():
    system = tiny_system()
    section = replace(system.config.model, predictor=config.PredictorConfig(kind="dense", upsampling=2))
    system = system._replace(config=replace(system.config, model=section))  # 10 ms a weight
    timing = [torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0])]  # fires in steps 0, 1 and 2, at -1.5, -0.5, 0.5
    found = Hypotheses(ints(4, 5, 2)[None], ints(3), torch.zeros(1, 3), [], torch.zeros(1, 4), timing)
    assert decode.token_times(system, found, 0, [0, 1]) == [(0.0, 0.0), (0.0, 0.042)]

@pytest.mark.parametrize("variant", (*VARIANTS, *HOTWORD_KITS))
def test_decode_gives_funasrs_ids_texts_and_timestamps(variant, tmp_path):  # C44 C150 C155
    """results.json, for all recordings in one batch: FunASR's results of each alone, with each list but x2.5 and x0."""
    results = results_by_recording(variant)
    arguments = ["--ckpt", kit(variant), *(kit(f"wavs/{name}.wav") for name in results)]
    equal = flagged = 0
    for case in ("none", "empty", "one", "several", "oov", "file", "many") if variant in HOTWORD_KITS else ("none",):
        options = []
        if case != "none":
            given = kit(variant, "hotwords.txt") if case == "file" else " ".join(hotword_phrases(variant, case) or [])
            options = ["--hotwords", given]
        for got, result in zip(json_rows(tmp_path / "out.jsonl", *arguments, *options), results.values(), strict=True):
            expected = result["hot"][case] if "hot" in result else result
            assert [token["id"] for token in got["tokens"]] == expected["ids"]
            if "no_bias_rows" in expected and case != "none":
                rows = zip(expected["ids_raw"], expected["no_bias_rows"])
                wanted = [not kept for id, kept in rows if id not in (BLANK, SOS, EOS)]
                assert [token.get("hotword", False) for token in got["tokens"]] == wanted
                flagged += sum(wanted)
            times = [[round(word["start"] * 1000), round(word["end"] * 1000)] for word in got["words"]]
            flat = list(itertools.chain(*times))
            assert flat == sorted(flat) and max(flat, default=0) <= 1000 * result["seconds"] + 60
            if funasr_keeps([token["token"] for token in got["tokens"]]):
                equal += 1
                assert got["text"] == expected["text"] and expected.get("timestamp") in (None, times)
                if "pred_timestamp" in expected:  # times from the firing, FunASR's words
                    assert " ".join(word["word"] for word in got["words"]) == expected["pred_timestamp"]["text"]
    assert equal > 0 and (flagged > 20 or "seaco" not in variant)

@pytest.mark.parametrize("content, phrases, weighted", [
    ("\ufeffhello world\n\n# names\n  我 在 这里 \nthanks", ["hello world", "我 在 这里", "thanks"], False),
    ("hello world 20\n我在 -5\n", ["hello world", "我在"], True), ("我\t3.5\r\n", ["我"], True),
    ("hello 7\nthanks\n", ["hello 7", "thanks"], False), ("# none\n", [], False)])
def test_a_file_of_hotwords_has_phrases_remarks_and_weights(tmp_path, capsys, content, phrases, weighted):  # C155
    path = tmp_path / "words.txt"
    path.write_text(content, encoding="utf-8")
    assert hotwords.read_hotwords(str(path)) == (phrases, weighted)
    system = decode.with_hotwords(kit_system("seaco"), str(path))
    assert system.hotwords == tuple(phrases)
    assert ("taken for weights and ignored" in capsys.readouterr().err) == weighted

def test_hotwords_that_cannot_work_are_named(tmp_path, capsys):  # C155
    system = kit_system("seaco")
    decode.with_hotwords(system, "hello AI大 龘 我-在 我在")
    assert "cannot spell, so these hotwords help little: AI大, 龘, 我-在 (write" in capsys.readouterr().err
    decode.with_hotwords(system, "hello 我在")
    assert capsys.readouterr().err == ""
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    for variant, given, error in (
            ("sanm", "hello", "--hotwords: wanted a model that can be told hotwords, FunASR's SeacoParaformer "
             "(paraformer-zh) or ContextualParaformer, got a Paraformer"),
            ("seaco", tmp_path / "none.txt", "none.txt: wanted a file of hotwords, one a line, got no such file"),
            ("seaco", tmp_path / "latin.txt", "latin.txt: wanted hotwords in UTF-8, one a line, got ")):
        assert error in refusal(capsys, "--ckpt", kit(variant), "--hotwords", given, "a.wav")
    feats = [torch.zeros(9, 560)]
    with pytest.raises(ValueError, match="hotwords: wanted a model that can be told hotwords"):
        decode.transcribe(kit_system("sanm")._replace(hotwords=("a",)), feats)
    told = [decode.listening_model(system, given) is not system.model for given in (
        [None, None], [None, ("hello",)], [("hello",), None], [("hello",)])]
    assert told == [False, True, True, True]

def test_too_short_a_recording_is_empty_text_and_silence_no_error(tmp_path, capsys):  # C51
    for name, samples in (("short", 100), ("frame", 500), ("silence", 16000)):
        audio.save_wav(tmp_path / f"{name}.wav", torch.zeros(samples), 16000)
    for variant in VARIANTS:
        wavs = [str(tmp_path / f"{name}.wav") for name in ("short", "frame", "silence")]
        assert decode.main(["--ckpt", str(kit(variant)), "--device", "cpu", *wavs]) == 0
        assert capsys.readouterr().out.splitlines()[0] == f"{wavs[0]}\t"

@pytest.mark.parametrize("variant", (*VARIANTS, *HOTWORD_KITS, *STREAMING_KITS))
def test_an_exported_directory_has_funasrs_keys_and_loads_back(variant, tmp_path, capsys):  # C39 C50 C152 C164
    system = kit_system(variant)
    for path in (tmp_path / "dir", tmp_path / "model.pt"):
        assert decoded(capsys, "--ckpt", kit(variant), "--export", path)[:2] == (0, [])
        again = checkpoint.load_system(path, "cpu")
        assert (again.config.model, again.tokenizer) == (system.config.model, system.tokenizer)
        assert torch.equal(again.stats, system.stats)
        assert all(torch.equal(x, again.model.state_dict()[name]) for name, x in system.model.state_dict().items())
    assert set(torch.load(tmp_path / "model.pt", weights_only=True)) == {"config", "tokenizer", "stats", "model"}
    ours, theirs = (funasr.read_weights(folder / "model.pt") for folder in (tmp_path / "dir", kit(variant)))
    assert set(ours) == set(theirs) and all(torch.equal(x, theirs[name]) for name, x in ours.items())
    ours, theirs = (funasr.read_values(folder / "config.yaml") for folder in (tmp_path / "dir", kit(variant)))
    parts = ("model", "encoder", "decoder", "predictor", "seaco_decoder", "frontend")
    assert [ours.get(part) for part in parts] == [theirs.get(part) for part in parts]

def sanm_system(unit: str) -> checkpoint.System:
    """In the layout that FunASR knows."""
    sections = {"encoder": {**SMALL["encoder"], "kind": "sanm"}, "predictor": {"kind": "dense", "tail": 0.45},
                "decoder": {**SMALL["decoder"], "kind": "sanm"}, "norm_eps": 1e-12}
    options = config.from_dict({"model": {**SMALL, **sections}, "data": {"num_mels": 20}}, "test")
    tokens = Tokenizer.build(["a b"], unit)
    return checkpoint.System(options, tokens, torch.rand(2, 20),
                             checkpoint.build(options.model, 20, len(tokens)).eval())

def test_a_model_of_ours_in_the_sanm_layout_becomes_a_directory_and_others_a_checkpoint(tmp_path):  # C50
    system, other = sanm_system("word"), tiny_system()
    checkpoint.export(system, str(tmp_path / "dir"))
    again = checkpoint.load_system(tmp_path / "dir", "cpu")
    assert again.tokenizer.symbols == ("<blank>", "<s>", "</s>", "<unk>", "a", "b")
    feats = torch.randn(1, 40, 20)
    ours, theirs = (net.greedy(feats, torch.tensor([40])) for net in (system.model, again.model))
    assert torch.equal(ours.tokens, theirs.tokens)
    close(ours.log_probs, theirs.log_probs, 1e-5)
    assert "encoder.kind transformer: FunASR has no such layer" in checkpoint.export(other, str(tmp_path / "x"))
    again = checkpoint.load_system(tmp_path / "x", "cpu")
    assert again.tokenizer == other.tokenizer
    assert torch.equal(again.model.embedding.weight, other.model.embedding.weight)

def test_an_export_replaces_no_model_and_none_that_fails_leaves_a_part(tmp_path, monkeypatch):  # C50
    for name in ("checkpoint.pt", "configuration.json", "config.yaml", "model.pt", "tokens.json", "seg_dict", "am.mvn",
                 "a.pt"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("of another")
        place = folder / name if name == "a.pt" else folder
        for write in (lambda: checkpoint.export(tiny_system(), str(place)), lambda: checkpoint.export_int8("x", place)):
            with pytest.raises(ValueError, match=f"--export: wanted a path where no model is, got {place}, where "
                                                 f"{folder / name} is$"):
                write()
        assert [path.read_text() for path in folder.iterdir()] == ["of another"]

    for name, error in ((None, OSError(errno.ENOSPC, "Full")), (".tmp", PermissionError(errno.EACCES, "Full"))):
        def full(path: Path, state: dict) -> None:
            error.filename = name and str(path)     # of an error of `open`
            raise error

        monkeypatch.setattr(checkpoint, "save", full)
        with pytest.raises(OSError, match="Full: '[^']*/model.pt'"):
            checkpoint.export(sanm_system("word"), str(tmp_path / "new"))
    assert not [*(tmp_path / "new").iterdir()]

@pytest.mark.parametrize("target", ["out", "out.pt"])
def test_an_export_that_does_not_fit_on_the_disk_is_one_line_and_leaves_nothing(ckpt, tmp_path, capsys, target):  # C34
    """Files that may have 9 kB play the disk; the weights have more."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, usual[1]))
    try:
        assert "File too large" in refusal(capsys, "--ckpt", ckpt, "--export", tmp_path / target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]

# ---- decode: limits and units ----

def test_an_export_has_no_dither_and_float16_weights_give_a_float32_model(tmp_path):
    folder, exported = tmp_path / "out", sanm_system("word")
    checkpoint.export(exported, str(folder))
    values = config.parse_yaml((folder / "config.yaml").read_text(), "config.yaml")
    assert values["frontend_conf"]["dither"] == 0.0
    weights = torch.load(folder / "model.pt", weights_only=True)
    torch.save({name: x.half() for name, x in weights.items()}, folder / "model.pt")
    system = checkpoint.load_system(folder, "cpu")
    for (name, ours), theirs in zip(system.model.named_parameters(), exported.model.parameters()):
        assert ours.dtype == torch.float32, name
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)

CODES = torch.randn(1, 6, 8), torch.tensor([6])  # of relative positions, and the length
SOURCE = torch.randn(1, 5, 8), None
WIDTHS = config.EncoderConfig(hidden_dim=8, num_heads=2, ffn_dim=16, kernel_size=3, dropout=0.0)

@pytest.mark.parametrize("make, given, times", [
    (lambda p: TransformerBlock(replace(WIDTHS, dropout=p)), (None,), 2),
    (lambda p: TransformerBlock(replace(WIDTHS, dropout=p), 8), (None, *SOURCE), 3),
    (lambda p: ConformerBlock(replace(WIDTHS, dropout=p)), (None,), 4),
    (lambda p: funasr_layers.SanmAttention(8, replace(WIDTHS, attention_dropout=p)), (None,), 0),
    (lambda p: funasr_layers.Fsmn(8, 3, 0, p), (None,), 1),
    (lambda p: funasr_layers.SanmBlock(8, replace(WIDTHS, dropout=p)), (None,), 2),
    (lambda p: funasr_layers.SanmDecoderBlock(replace(WIDTHS, dropout=p)), (None, *SOURCE), 2),
    (lambda p: funasr_layers.RelativeAttention(8, 2, p), CODES, 0),
    (lambda p: funasr_layers.RelativeConformerBlock(replace(WIDTHS, dropout=p)), (None, *CODES), 4)])
def test_dropout_has_an_effect_behind_every_part_in_training_and_none_outside(make, given, times):
    """times: how often what is added to the input passes the module's own dropout; attention drops its weights."""
    torch.manual_seed(0)
    module, x, changed = make(0.5), torch.randn(1, 6, 8), []
    for other in module.modules():
        if isinstance(other, nn.Dropout):
            other.p = 0.0 if other is not getattr(module, "dropout", None) else 0.5
    if times:
        module.dropout.register_forward_hook(lambda _, before, after: changed.append(not torch.equal(before[0], after)))
    for is_training in (True, False):
        module.train(is_training)
        if hasattr(module, "memory") and not times:  # its own dropout shows beside that of the memory
            module.memory.eval()
        first, second = (module(x, *given) for _ in range(2))
        assert torch.equal(first[0], second[0]) != is_training
        assert isinstance(first, torch.Tensor) or first[1] is None      # weights that nobody asked for
    assert changed == [True] * 2 * times + [False] * 2 * times

def test_an_empty_utterance_beside_a_full_one_has_no_tokens_also_with_a_timing_head():
    system = kit_system("bicif")
    assert system.config.model.predictor.upsampling
    feats = audio.frontend(*audio.load_wav(kit(f"wavs/{WAVS[0]}.wav")), system.config.data, system.stats)
    alone, = decode.transcribe(system, [feats])
    empty, full, short = decode.transcribe(system, [feats[:0], feats, feats[:1]])
    assert (empty.text, empty.tokens) == ("", []) and full.text == alone.text != ""
    assert all(0 <= token.start <= token.end for token in short.tokens)
    found = decode.decode_batch(system, [feats[:1]])
    none = found._replace(lens=torch.zeros(1, dtype=torch.int64), tokens=found.tokens[:, :0])
    assert decode.token_times(system, none, 0, []) == []
    both = system.model.greedy(torch.stack([feats, feats]), torch.tensor([len(feats), 0]))
    assert both.lens.tolist() == [len(alone.tokens), 0]

def test_a_predictor_may_have_one_layer_of_the_encoders_width_or_of_its_own():
    for width, layers, kernel_size in ((16, 1, 3), (24, 1, 5), (24, 2, 7)):
        section = tiny_system().config.model
        section = replace(section, predictor=replace(section.predictor, num_layers=layers, hidden_dim=width,
                                                     kernel_size=kernel_size))
        network = build(section, 8, 12).eval()
        assert [(x.out_channels, *x.kernel_size) for x in network.predictor.convolutions] == (
            [(width, kernel_size)] * layers)
        assert network.greedy(torch.randn(2, 9, 8), torch.tensor([9, 4])).tokens.shape[0] == 2

def test_the_statistics_of_two_ranks_are_their_mean(monkeypatch):
    """Two processes are played: a sum over ranks doubles what this one has and adds 2."""
    norm = nn.BatchNorm1d(3)
    norm.running_mean.fill_(5.0)
    monkeypatch.setattr(ranks, "num_ranks", lambda: 2)
    monkeypatch.setattr(ranks, "sum_tensor", lambda x: 2 * x + 2)
    ranks.average_statistics(norm)
    assert norm.running_mean.tolist() == [6.0] * 3 and norm.running_var.tolist() == [2.0] * 3
    assert norm.num_batches_tracked.item() == 1

# ---- serve: requests, batching and answers ----

def serving_system(unit: str = "char", mels: int = 40, kind: str = "manifest") -> checkpoint.System:
    """Random weights, a text of several tokens for a second of noise: no file is needed."""
    torch.manual_seed(3)
    sizes = {"hidden_dim": 32, "num_heads": 2, "num_layers": 1}
    settings = {"model": {"encoder": sizes, "decoder": sizes, "predictor": {"hidden_dim": 32, "num_layers": 1}},
                "data": {"kind": kind, "sample_rate": 8000, "num_mels": mels, "unit": unit}}
    built = config.from_dict(settings, "test")
    words = ["zero one two three four five six"] if unit == "word" else ["abcdef gh"]
    tokenizer = Tokenizer.build(words, unit)
    model = build(built.model, mels, len(tokenizer)).eval()
    with torch.no_grad():
        model.predictor.weight.bias -= 1.5          # about 20 frames a token
        model.decoder.output.bias[:4] = -9.0        # no special tokens
    return checkpoint.System(built, tokenizer, torch.stack([torch.zeros(mels), torch.ones(mels)]), model)

def serve_options(**changes) -> argparse.Namespace:
    options = vars(serve.parse_arguments(["--port", "0"]))
    waits = {name: PATIENCE for name in options if name.endswith("_timeout")}
    return argparse.Namespace(**{**options, **waits, **changes})

@contextlib.contextmanager
def serving(system: checkpoint.System | settings.Models | None = None, loaded: bool = True, **changes):
    """A server on a free port, in this process, that logs into a list; not loaded: it waits for its `open`."""
    lines: list[str] = []

    def log(level: str, event: str, **fields) -> None:
        lines.append(monitor.log_line("text", time.time(), level, event, fields))

    server = serve.Server(serve_options(**changes), log)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()       # as serve.start, but for 0.2
    server.lines = lines
    if loaded:
        models = system if isinstance(system, settings.Models) else settings.Models(None, system or serving_system())
        server.open(models)
    threading.Thread(target=server.batcher.run, daemon=True).start()
    try:
        yield server
    finally:
        serve.drain(server, 2.0)

@pytest.fixture(scope="module")
def server():
    with serving(max_body_mb=1.0, max_audio_seconds=20.0, max_frames=500) as started:
        yield started

def read_answer(connection: socket.socket, method: str = "GET") -> tuple[http.client.HTTPResponse, bytes]:
    response = http.client.HTTPResponse(connection, method=method)
    response.begin()
    return response, response.read()

def connected(server) -> socket.socket:
    return socket.create_connection(server.server_address[:2], PATIENCE)

def exchange(server, raw: bytes, end: bool = False) -> tuple[int, dict[str, str], bytes]:
    """Send bytes, read one whole answer (and with `end` nothing more) -> status, headers by lower-case name, body."""
    with connected(server) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(raw)
        if end:
            connection.shutdown(socket.SHUT_WR)
        try:
            response, body = read_answer(connection, "HEAD" if raw[:5] == b"HEAD " else "GET")
        except http.client.RemoteDisconnected:
            return 0, {}, b""
        return response.status, {name.lower(): value for name, value in response.getheaders()}, body

def ask(server, raw: bytes) -> dict:
    """The JSON of the answer."""
    status, _, body = exchange(server, raw)
    assert status == 200, body
    return json.loads(body, parse_constant=pytest.fail)

def post(path: str, media_type: str, body: bytes, more: str = "") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {media_type}\r\nContent-Length: {len(body)}\r\n{more}\r\n"
    return head.encode("latin-1") + body

def post_json(value, path: str = "/transcribe") -> bytes:
    return post(path, "application/json", value if isinstance(value, bytes) else json.dumps(value).encode())

def form(*parts: tuple, closing: str = "--B--\r\n") -> bytes:
    """Parts (header line, content) as a body with the boundary B."""
    head = "Content-Disposition: form-data; "
    pieces = [b"--B\r\n" + (head + line).encode() + b"\r\n\r\n" + content + b"\r\n" for line, content in parts]
    return b"".join(pieces) + closing.encode()

NOISE = (np.random.default_rng(7).standard_normal(9000) * 3000).astype("<i2")
FILE = ('name="file"; filename="a.wav"', wav(NOISE))
ROWS = np.random.default_rng(8).standard_normal((120, 40)).round(3).tolist()

def field(name: str, value: str) -> tuple:
    return f'name="{name}"', value.encode()

def rows(i: int, j: int, text: str) -> bytes:
    """{"features": ...} of three rows of zeros with text at row i, column j."""
    cells = [["0"] * 40 for _ in range(3)]
    cells[i][j] = text
    return ('{"features": [' + ",".join("[" + ",".join(row) + "]" for row in cells) + "]}").encode()

def get(line: str = "GET /health HTTP/1.1", *headers: str) -> bytes:
    return "\r\n".join([line, "Host: x", *headers, "", ""]).encode("latin-1")

def oai(*parts: tuple, path: str = "/v1/audio/transcriptions", boundary: str = "; boundary=B", **more) -> bytes:
    return post(path, f"multipart/form-data{boundary}", form(*parts, **more))

def wide_get(size: int) -> bytes:
    """A request for /health with a head of so many bytes, the empty line apart."""
    return get("GET /health HTTP/1.1", "A: " + "b" * (size + 2 - len(get("GET /health HTTP/1.1", "A: "))))

def wide_name(size: int) -> str:
    """A part's line, for `form`, that makes its header so long."""
    line = 'name="file"; filename=""'
    return line[:-1] + "a" * (size - len("Content-Disposition: form-data; " + line)) + '"'

def chunked(sent: bytes) -> bytes:
    """A request whose head says that its body comes in chunks, and what then comes."""
    return get("POST /transcribe HTTP/1.1", "Content-Type: application/json", "Transfer-Encoding: chunked") + sent

BAD_CHUNKS = [b"\r\n\r\n", b"-1\r\n", b"0x2\r\n{}\r\n0\r\n\r\n", b"000000002\r\n{}", b" 2\r\n{}\r\n0\r\n\r\n",
              b"+2\r\n{}\r\n", b"g\r\n", b"1\r\n{}\r\n0\r\n\r\n", b"2\n{}\n0\n\n" + bytes(300), b"2;\0\r\n{}\r\n",
              b"2;" + b"a" * 255 + b"\r\n{}\r\n0\r\n\r\n"]
BAD_LINES = ["GET  /health HTTP/1.1", "GET /health HTTP/0.9", "GET /health HTTP/1.10", "GET /health http/1.1",
             "GET HTTP/1.1", "GET\t/health\tHTTP/1.1", "GET /health%ff HTTP/1.1",
             f"GET /health?{'a=b&' * 100}a=b HTTP/1.1"]      # 101 fields
BAD_HEADERS = ["Host: y", "Authorization: a\r\nAuthorization: a", "Content-Type: a\r\nContent-Type: a", "A : b",
               "nonsense", ": b", "A: b\r\n c", "A: b\0c", "A: b\rc", "Content-Length: 5\r\nContent-Length: 6",
               *(f"Content-Length:{size}" for size in ("", " -1", " +5", " 0x5", " 5, 5", " \xb2")),
               "Content-Length: 5\r\nTransfer-Encoding: chunked", "Transfer-Encoding: gzip, chunked"]
Z = [0.0] * 40
CHUNKED_BODY = json.dumps({"features": ROWS[:30]}).encode()
AUDIO_POST = ("POST /transcribe HTTP/1.1", "Content-Type: audio/wav")
ENDLESS_LINE = b"GET /" + b"a" * 9000
BAD_FRAMING = {  # by status and code: what is sent
    (400, "bad_framing"): [
        *map(get, BAD_LINES), *map(chunked, BAD_CHUNKS),
        *(get("POST /transcribe HTTP/1.1", line) for line in BAD_HEADERS),
        b"GET /health\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", bytes(range(128, 256)) + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\r\n\r\n", b"GET /health HTTP/1.1\nHost: x\n\n",
        b"GET /health HTTP/1.1\r\n\r\n", get("POST /transcribe HTTP/1.0", "Transfer-Encoding: chunked"),
        post_json(b"{}")[:-1]],
    (411, "length_required"): [get("POST /transcribe HTTP/1.1")],
    (413, "body_too_large"): [
        get(*AUDIO_POST, "Content-Length: " + "9" * 5000), get(*AUDIO_POST, "Content-Length: 1048577"),
        post("/transcribe", "audio/wav", bytes(2**23)),         # whose client reads the answer when all is sent
        chunked(b"FFFFFFFF\r\n"), chunked(b"80000\r\n" + bytes(2**19) + b"\r\n80001\r\n")],
    (414, "uri_too_long"): [get(f"GET /{'a' * 4099} HTTP/1.1"), ENDLESS_LINE],       # a line of 4,113
    (431, "headers_too_large"): [
        get("GET /health HTTP/1.1", *["A: b"] * 100), wide_get(65537), chunked(b"0\r\n" + b"A: b\r\n" * 101),
        chunked(b"0\r\n" + b"A:" + b"b" * 65533 + b"\r\n\r\n")],
    (404, "not_found"): [get(f"GET {path} HTTP/1.1") for path in (
        "/nothing", "/../../etc/passwd", "/<script>alert(1)</script>", "/v1/models/other")],
    (405, "method_not_allowed"): [
        post("/health", "text/plain", b"x"), *(get(f"{line} HTTP/1.1") for line in (
            "GET /transcribe", "DELETE /v1/models", "BREW /transcribe", "get /health"))],
    (415, "unsupported_media_type"): [
        b"POST /transcribe HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}",
        post("/transcribe", "text/plain", b"{}"),
        post("/transcribe", "application/x-www-form-urlencoded", b"a=b"), post("/transcribe", "text/audio", b"ID3"),
        post("/transcribe", "application/json", b"{}", "Content-Encoding: gzip\r\n"),
        post("/v1/audio/transcriptions", "application/json", b"{}")]}
BAD_JSON = {
    (400, "invalid_json"): [
        b"", b"  ", b'{"features": [', b'{"features": "\xff"}', b"\xef\xbb\xbf{}", '{"features": []}'.encode("utf-16"),
        b"{} x", b"[]", b"null", b"1", b'"a"', b"{'features': []}", b'{"features": [1,]}', b"[" * 100000,
        b'{"features":' + b"[" * 20000 + b"]" * 20000 + b"}", rows(0, 1, "01"), rows(0, 1, "0x1"),
        b'{"timeout": 1, "features": [], "timeout": 2}'],
    (400, "missing_field"): [{}, {"feature": [Z]}, {"batch": [{"features": [Z]}, {}]}],
    (400, "invalid_type"): [{"features": value} for value in (None, "a", {"0": Z}, 1, True)],
    (422, "empty_features"): [{"features": []}],
    (422, "invalid_type"): [
        {"batch": [[Z]]}, *({"features": value} for value in (Z, [Z, None], ["0" * 40], [[Z] * 40])),
        *(rows(1, 2, text) for text in ("null", "true", '"1.0"', "[0]", "{}"))],
    (422, "wrong_dim"): [
        {"batch": [{"features": [Z]}, {"features": [Z[1:]]}]},
        *({"features": value} for value in ([[]], [Z[:39]], [Z + [0]], [Z, Z[:20], Z]))],
    (422, "not_finite"): [
        rows(0, 0, "NaN"), rows(2, 39, "Infinity"), rows(2, 39, "-Infinity"), rows(0, 1, "1e999"), rows(0, 1, "1e39"),
        rows(0, 1, "-1e39"), rows(0, 1, "9" * 5000)],
    (413, "too_many_frames"): [{"features": [[0] * 40] * 501}, {"features": [[]] * 100000}],
    (422, "invalid_value"): [
        *({"batch": value} for value in ([], None, [{"features": [Z]}] * 65)),
        {"batch": [{"features": [Z]}], "features": [Z]},
        *({"features": [Z], "timeout": value} for value in (0, -1, "soon", "5", True, [1])),
        b'{"features": [[' + b",".join([b"0"] * 40) + b']], "timeout": 1e999}'],
    (400, "invalid_value"): [{"features": [Z], "alignment": 2}, {"features": [Z], "alignment": []}]}
FORM = ("/v1/audio/transcriptions", "multipart/form-data; boundary=B")

def bounded(*boundaries: str) -> list[bytes]:
    """The same form with each boundary, as it stands in Content-Type."""
    parts = [form(FILE).replace(b"--B", b"--" + boundary.strip('"').encode()) for boundary in boundaries]
    return [post("/transcribe", f"multipart/form-data; boundary={x}", body) for x, body in zip(boundaries, parts)]

BAD_FORMS = {
    (400, "invalid_multipart"): [
        *(oai(FILE, boundary=text) for text in ("", "; boundary=", "; boundary=C")),
        *bounded("B" * 71, '"' + "B" * 71 + '"'),
        oai(FILE, closing=""), oai(FILE, closing="--B-"), post(*FORM, b""), post(*FORM, b"{}"),
        post(*FORM, form(FILE).replace(b"--B\r", b"--Bx\r")),
        oai(FILE, ('filename="b"', b"")), oai(FILE, ('name=""', b"")), oai((wide_name(8193), wav(NOISE))),
        post(*FORM, b'--B\r\nContent-Disposition: form-data; name="file"\r\n--B--\r\n'),
        oai(FILE, *(field(f"x{i}", "") for i in range(128))), oai(FILE, ('name="language"', b"\xff"))],      # 129 parts
    (400, "missing_file"): [
        oai(), oai(field("model", "x")), oai(field("file", "a.wav")), oai(FILE, FILE),
        oai(('name="audio"; filename="a.wav"', wav(NOISE)))],
    (400, "invalid_value"): [oai(FILE, field(name, value)) for name, value in (
        ("response_format", "xml"), ("response_format", ""), ("timestamp_granularities[]", "char"),
        ("include[]", "all"), ("temperature", "1.01"), ("temperature", "-0.01"), ("temperature", "hot"),
        ("temperature", "nan"), ("stream", "maybe"))]}
BAD_WAVS = {
    (400, "empty_audio"): [b"", wav(b"")],
    (400, "unsupported_format"): [
        b"x" * 100, b"RIFF\0\0\0\0WAVE", b"RIFF", b"ID3\x04" + bytes(99), b"OggS" + bytes(99), b"fLaC" + bytes(99),
        b"\x1aE\xdf\xa3" + bytes(99), b"\0\0\0\x20ftypM4A " + bytes(99), b"RIFX" + wav(NOISE)[4:], wav(NOISE)[:36],
        b"RIFF\0\0\0\0WAVEdata\4\0\0\0\0\0\0\0", wav(bytes(99), 2, 4), wav(bytes(99), align=3), wav(bytes(99), 1, 12),
        wav(bytes(99), 3, 16), wav(bytes(99), 1, 0), wav(bytes(99), channels=0), wav(bytes(180), channels=9),
        *(wav(NOISE, rate_hz=rate_hz) for rate_hz in (0, 3999, 384001, 2**32 - 1)),
        wav(NOISE, before=b"LIST\0\0\0\0" * 100000), wav(NOISE, before=b"LIST\xff\xff\xff\x7f")],
    (422, "not_finite"): [
        wav(np.array([0, np.nan] * 900, "<f4"), 3, 32), wav(np.array([0, np.inf] * 900, "<f8"), 3, 64),
        wav(np.array([1e38] + [0] * 900, "<f4"), 3, 32)],       # finite, but its square is not
    (413, "audio_too_long"): [wav(bytes(20 * 8000 + 1), bits=8)]}        # 20 s and a sample
TABLE = []
for make, groups in ((bytes, BAD_FRAMING), (post_json, BAD_JSON), (bytes, BAD_FORMS),
                     (lambda body: post("/transcribe", "audio/wav", body), BAD_WAVS),
                     (lambda body: oai((FILE[0], body)), BAD_WAVS)):
    for answer, cases in groups.items():
        TABLE += [(make(case), *answer) for case in cases]

HALF = b"80000\r\n" + b" " * 2**19 + b"\r\n"
LARGEST = [  # what a server with the limits of the fixture `server` still takes
    get(f"GET /health?{'a' * 4091} HTTP/1.1"), wide_get(65536), get("GET /health HTTP/1.1", *["A: b"] * 99),
    b"GET /health HTTP/1.0\r\n\r\n", get(f"GET /health?{'a=b&' * 99}a=b HTTP/1.1"),
    *(get(f"GET HTTP://x:8000{path} HTTP/1.1") for path in ("", "?a", "/health")),
    post_json({"features": [[0] * 40] * 500}), post_json({"batch": [{"features": [Z]}] * 64}),
    oai(FILE, *(field(f"x{i}", "") for i in range(127))), oai((wide_name(8192), wav(NOISE))),
    *bounded("B", "B" * 70, '"B"', '"' + "B" * 70 + '"'),
    post(*FORM, form(FILE).replace(b"--B\r", b"--B \t\r")),        # RFC 2046: spaces behind a boundary
    oai(("name=file; filename*=UTF-8''a.wav", wav(NOISE))), oai(FILE, field("temperature", "1")),
    oai(FILE, field("alignment", "of OpenAI's API there is none")),
    *(post("/transcribe", "audio/wav", body) for body in (wav(bytes(20 * 8000), bits=8), wav(bytes(1600), channels=8),
                                                          wav(NOISE, rate_hz=4000), wav(NOISE, rate_hz=384000)))]
LARGEST_BODIES = [  # and bodies that are read whole: the code of what is wrong with them
    ("missing_field", chunked(b"2\r\n{}\r\n0\r\n" + b"A: b\r\n" * 100 + b"\r\n")),
    ("missing_field", chunked(b"2\r\n{}\r\n0\r\n" + b"A:" + b"b" * 65532 + b"\r\n\r\n")),
    ("missing_field", chunked(b"2;" + b"a" * 254 + b"\r\n{}\r\n0\r\n\r\n")),
    ("invalid_json", chunked(HALF + HALF + b"0\r\n\r\n")), ("invalid_json", post_json(b" " * 2**20))]

def healthy(server) -> bool:
    return exchange(server, get())[0] == 200

def check_error(status: int, headers: dict, body: bytes) -> tuple[int, str]:
    """The error object, checked against the contract's form -> status and code."""
    assert headers["content-type"] == "application/json" and headers["x-content-type-options"] == "nosniff"
    assert re.fullmatch("[A-Za-z0-9._-]{1,64}", headers["x-request-id"]) and len(body) < 8192
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "Traceback" not in error["message"]
    usual = "server_error" if status >= 500 else "invalid_request_error"
    assert error["type"] == {401: "authentication_error", 429: "rate_limit_error"}.get(status, usual)
    return status, error["code"]

@pytest.mark.parametrize("raw, status, code", TABLE, ids=[f"{i} {raw[:60]}" for i, (raw, _, _) in enumerate(TABLE)])
def test_malformed_request_gets_its_error_and_the_server_lives(server, raw, status, code):  # C52 C191
    found = exchange(server, raw, end=raw in (post_json(b"{}")[:-1], ENDLESS_LINE))
    assert check_error(*found) == (status, code)
    assert ("allow" in found[1]) == (status == 405)
    if code in ("body_too_large", "unsupported_media_type"):    # a body that is not read is no next request
        assert found[1]["connection"] == "close"
    assert healthy(server)

def test_what_just_keeps_a_limit_is_taken(server):  # C52
    for raw in LARGEST:
        assert exchange(server, raw)[0] == 200, raw[:80]
    for code, raw in LARGEST_BODIES:
        assert check_error(*exchange(server, raw)) == (400, code), raw[:80]

def test_mutations_of_good_requests_are_answered_or_refused(server):  # C52
    rng = np.random.default_rng(11)
    good = [post_json({"features": ROWS[:3], "timeout": 99}), post("/transcribe", "audio/wav", wav(NOISE[:900])),
            oai(FILE, field("response_format", "srt")), get()]
    seen = collections.Counter()
    for trial in range(200):
        raw = bytearray(good[trial % 4])
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(min(len(raw), 400)))
            kind = rng.integers(3)
            if kind == 0:
                raw[at] = rng.integers(256)
            elif kind == 1:
                del raw[at:at + rng.integers(1, 9)]
            else:
                raw[at:at] = bytes(rng.integers(0, 256, 3, dtype=np.uint8))
        status, headers, body = exchange(server, bytes(raw), end=True)
        if status >= 400:
            check_error(status, headers, body)
        seen[status] += 1
    assert not seen[500] and set(seen) <= {0, 200, 400, 404, 405, 408, 411, 413, 414, 415, 422, 431} and seen[200], seen
    assert healthy(server)

@pytest.mark.parametrize("body", [rows(1, 1, "3e38"), rows(1, 1, "-3e38"), rows(0, 0, "1e-45"),
                                  rows(0, 0, "12345678901234567890")])
def test_extreme_finite_features_are_answered_in_strict_json(server, body):  # C53
    assert 0 <= ask(server, post_json(body))["confidence"] <= 1

def test_answer_spells_its_text_with_times_inside_and_weights_on_demand(server):  # C53
    began = time.monotonic()
    found = ask(server, post_json({"features": ROWS, "alignment": True, "unknown": 1}))
    timing, whole_ms = found["timing"], 1000 * (time.monotonic() - began)
    assert timing["queue_ms"] + timing["infer_ms"] - 0.02 <= timing["total_ms"] <= whole_ms + 0.01
    assert "".join(token["token"] for token in found["tokens"]) == found["text"] and len(found["tokens"]) > 2
    starts = [token["start"] for token in found["tokens"]]
    assert starts == sorted(starts) and found["tokens"][-1]["end"] <= found["duration"] == 1.2
    assert found["frames"] == 120
    logs = [math.log(token["confidence"]) for token in found["tokens"]]
    assert abs(found["confidence"] - math.exp(sum(logs) / len(logs))) < 1e-3
    weights = found["alignment"]["weights"]
    assert len(weights) * found["alignment"]["step"] == pytest.approx(1.2)
    assert round(sum(weights)) == len(found["tokens"])
    assert "alignment" not in ask(server, post_json({"features": ROWS}))

def test_every_way_in_gives_the_same_transcript(server):
    raw = wav(NOISE)
    texts = [ask(server, request)["text"] for request in (
        post("/transcribe", "audio/x-wav", raw), oai(FILE, path="/transcribe"), oai(FILE),
        post("/transcribe", "multipart/form-data; boundary=B",       # a part of a header alone: RFC 2046, 5.1.1
             b'--B\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n' + form(FILE)),
        post_json({"features": audio.frontend(torch.from_numpy(NOISE / 32768).float(), 8000,
                                             serving_system().config.data).tolist()}))]
    assert texts[0] and texts == texts[:1] * 5

def test_silence_and_audio_below_one_frame_are_normal_results(server):  # C57
    system = serving_system()
    with torch.no_grad():
        system.model.predictor.weight.bias -= 30        # nothing ever fires
    with serving(system) as quiet:
        for raw in (wav(bytes(16000)), wav(bytes(20))):
            found = ask(quiet, post("/transcribe", "audio/wav", raw))
            assert (found["text"], found["confidence"], found["tokens"]) == ("", 0.0, [])
            verbose = ask(quiet, oai((FILE[0], raw), field("response_format", "verbose_json")))
            assert (verbose["text"], verbose["segments"]) == ("", [])
            assert exchange(quiet, oai((FILE[0], raw), field("response_format", "srt")))[2] == b""
            assert exchange(quiet, oai((FILE[0], raw), field("response_format", "vtt")))[2] == b"WEBVTT\n\n"

def test_same_utterance_gets_the_same_text_in_any_batch(server):  # C54
    """Oracle: each utterance alone."""
    system, rng = serving_system(), np.random.default_rng(0)
    feats = [torch.from_numpy(rng.standard_normal((n, 40))).float() for n in rng.integers(5, 260, 24)]
    alone = [transcribe.recognise_batch(system, [x])[0].result for x in feats]
    for trial in range(6):
        chosen = rng.permutation(24)[:rng.integers(2, 17)]
        for i, found in zip(chosen, transcribe.recognise_batch(system, [feats[i] for i in chosen])):
            assert found.result.text == alone[i].text
            assert abs(found.result.confidence - alone[i].confidence) < 2e-3

def test_an_answer_has_its_times_in_ms_and_rounded_figures():
    said = report.Result("a", 1.0, [report.Token("a", 4, 1.0, 0.0, 0.5)], [])
    pieces = [(0.0, torch.zeros(7, 40)), (0.1, torch.zeros(5, 40))]
    upload = SimpleNamespace(pieces=pieces, seconds=1.23456, hotwords=None)
    jobs = [SimpleNamespace(queued=10.0, taken=taken, infer_sec=sec, batch_size=size) for taken, sec, size in (
        (10.0123456, 0.0501234, 2), (10.0123456, 0.0501234, 2), (11.0, 0.025, 3))]  # two were in one batch
    heard = transcribe.Heard(upload, jobs, transcribe.Recognition(said, [0.123456]))
    value = transcribe.entry(serving_system(), heard, 99.98765, True)
    assert value["timing"] == {"queue_ms": 12.35, "infer_ms": 75.12, "total_ms": 99.99, "batch_size": 3}
    assert (value["frames"], value["duration"], value["alignment"]["weights"]) == (12, 1.235, [0.1235])
    assert "sentences" not in value and "warning" not in value

def test_the_weights_of_pieces_stand_where_they_begin_with_zeros_between():
    system, said = serving_system(), report.Result("a", 1.0, [report.Token("a", 4, 1.0, 0.0, 0.5)], [])
    found = [transcribe.Recognition(said, weights) for weights in ([0.5], [0.25, 0.125])]
    for place, zeros in ((1.4, 0), (2.4, 1), (2.6, 2)):
        pieces = [(0.0, None), (place * transcribe.frame_step(system), None)]
        joined = transcribe.join_pieces(system, SimpleNamespace(pieces=pieces, seconds=9.0), found)
        assert joined.weights == [0.5, *[0.0] * zeros, 0.25, 0.125] and len(joined.result.tokens) == 2
    halves = transcribe.recognise_batch(tiny_system(), ragged_feats([31, 8, 7]))  # two frames are one
    assert [len(one.weights) for one in halves] == [16, 4, 4]

@pytest.mark.parametrize("unit", ["char", "word"])
def test_a_long_upload_gets_the_answer_of_its_recording_on_both_routes(tmp_path, unit):  # C80
    """Its pieces are jobs like any others, but one utterance of the queue. Oracle: decode.transcribe_recording."""
    system = serving_system(unit)._replace(segment_sec=(0.5, 2.0))
    raw = Path(long_wav(tmp_path / "a.wav", 9.0)).read_bytes()
    wanted = decode.transcribe_recording(system, raw)
    with serving(system, max_queue=1) as server:
        found = ask(server, post("/transcribe?alignment=true", "audio/wav", raw))
        verbose = ask(server, oai((FILE[0], raw), field("response_format", "verbose_json"),
                                  field("timestamp_granularities[]", "word")))
        short = exchange(server, oai(FILE))[0]
    assert found["text"] == verbose["text"].strip() == wanted.text.strip() and len(wanted.tokens) > 20 and short == 200
    assert (found["duration"], found["timing"]["batch_size"]) == (9.0, pytest.approx(6, abs=5))
    for got, token in zip(found["tokens"], wanted.tokens, strict=True):
        assert (got["token"].removeprefix("▁"), got["id"]) == (token.token, token.id)
        assert (got["start"], got["end"]) == pytest.approx((token.start, token.end), abs=2e-3)
    assert [(word["word"], word["start"]) for word in verbose["words"]] == [(w.text, w.start) for w in wanted.words]
    weights, step = found["alignment"]["weights"], found["alignment"]["step"]
    assert 8.9 < len(weights) * step < 9.05
    pieces = list(decode.cut_recording(system, raw))
    alone = transcribe.recognise_batch(
        system, [audio.frontend(pieces[3].samples, 8000, system.config.data, system.stats)])[0]
    at = round(pieces[3].start_sec / step)
    assert weights[at:at + len(alone.weights)] == pytest.approx(alone.weights, abs=2e-3)

def test_batch_request_answers_in_order(server):
    sizes = [3, 90, 30, 3, 120]
    found = ask(server, post_json({"batch": [{"features": ROWS[:n]} for n in sizes]}))
    assert [item["frames"] for item in found["results"]] == sizes and found["id"]
    single = ask(server, post_json({"features": ROWS[:90]}))
    assert found["results"][1]["text"] == single["text"]
    with pytest.raises(web.Refusal, match="batch: wanted 1 to 2 objects"):       # more would never fit into the queue
        bodies.json_uploads({"batch": [{"features": [Z]}] * 3}, server.models.whole, serve_options(max_queue=2))

# ---- serve: what clients send ----

FORMATS = {  # by name: ffmpeg's flags, and what the message calls it
    "mp3": ([], "MP3"), "bare.mp3": (["-write_xing", "0", "-id3v2_version", "0"], "MP3"), "m4a": ([], "MP4 or M4A"),
    "ogg": (["-c:a", "libvorbis"], "Ogg"), "opus": ([], "Opus in Ogg"), "flac": ([], "FLAC"), "aac": ([], "AAC"),
    "webm": (["-c:a", "libopus"], "WebM or Matroska"), "aiff": ([], "AIFF"), "wma": ([], "WMA")}

@functools.cache
def encoded(name: str, seconds: float = 1.125, more: tuple = ()) -> bytes:
    """NOISE, or so many seconds of it, as ffmpeg writes it."""
    if shutil.which("ffmpeg") is None:
        pytest.skip("ffmpeg is not installed (apt-get install -y ffmpeg)")
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/a.{name}"
        command = ["ffmpeg", "-v", "error", "-i", "pipe:0", *more, *FORMATS[name][0], path]
        subprocess.run(command, check=True, timeout=PATIENCE, input=wav(np.resize(NOISE, int(8000 * seconds))))
        return Path(path).read_bytes()

@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read_on_both_routes_and_named_without_ffmpeg(server, monkeypatch, name):  # C190
    """Real files. Oracle: the recording that they were made of."""
    raw = encoded(name)
    found = ask(server, post("/transcribe", "audio/mpeg", raw))
    assert found == {**found, "duration": pytest.approx(1.125, abs=0.2)} and len(found["tokens"]) > 2
    if name in ("flac", "aiff"):
        assert found["tokens"] == ask(server, post("/transcribe", "audio/wav", wav(NOISE)))["tokens"]
    in_a_form = ('name="file"; filename="blob"', raw)
    assert ask(server, oai(in_a_form))["text"] == found["text"]
    monkeypatch.setenv("PATH", "")
    refused = exchange(server, oai(in_a_form))
    assert check_error(*refused) == (400, "unsupported_format")
    assert json.loads(refused[2])["error"]["message"].endswith(f"got {FORMATS[name][1]}")

def test_an_m4a_whose_index_stands_at_its_end_is_read_whole(server):  # C190
    raw = encoded("m4a", 9.0, ("-ar", "44100", "-b:a", "192k"))
    assert len(raw) > 2**17 and raw.index(b"moov") > raw.index(b"mdat")
    assert ask(server, post("/transcribe", "audio/mp4", raw))["duration"] == pytest.approx(9, abs=0.1)

def test_what_is_converted_has_the_limits_of_every_recording(server, monkeypatch, tmp_path):  # C190
    found = exchange(server, post("/transcribe", "audio/flac", encoded("flac", 20.05)))
    assert check_error(*found) == (413, "audio_too_long")
    for junk, name in ((b"<!DOCTYPE html><p>", "an HTML page"), (b"{}", "JSON"), (b"x" * 99, "an unknown format"),
                       (b"#EXTM3U\nfile:///etc/passwd", "an unknown format")):
        found = exchange(server, oai(('name="file"; filename="a.mp3"', junk)))
        assert check_error(*found) == (400, "unsupported_format") and f"got {name}" in found[2].decode()
    script = tmp_path / "ffmpeg"
    script.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec /bin/sleep 600\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}")
    for seconds in (0.1, 1, 10, 100):       # until it was begun in time
        late = post(f"/transcribe?timeout={seconds}", "audio/mpeg", b"ID3")
        assert check_error(*exchange(server, late)) == (504, "deadline_exceeded")
        if (tmp_path / "pid").exists() and (pid := (tmp_path / "pid").read_text().strip()):
            break
    assert not Path(f"/proc/{pid}").exists()
    (tmp_path / "pid").unlink()
    with pytest.raises(web.ClientLeft):         # who has left is not converted for
        transcribe.as_wav(transcribe.Post(server, None, 0.0, lambda: True), bodies.Recording(b"ID3", {}, None))
    assert not (tmp_path / "pid").exists()
    with serving(no_ffmpeg=True) as strict:
        assert check_error(*exchange(strict, post("/transcribe", "audio/mpeg", b"ID3"))) == (400, "unsupported_format")

def test_a_list_in_a_form_may_be_written_as_any_client_does(server):  # C192
    verbose = field("response_format", "verbose_json")
    wanted = ask(server, oai(FILE, verbose, field("timestamp_granularities[]", "word")))
    assert wanted["words"] and "segments" not in wanted and wanted["language"] == "unknown"
    for name in ("timestamp_granularities", "timestamp_granularities[0]"):
        found = ask(server, oai(FILE, verbose, field(name, "word")))
        assert found["words"] == wanted["words"] and "segments" not in found
        both = ask(server, oai(FILE, verbose, field(name, "word"), field(name.replace("0", "1"), "segment"),
                               field("language", "en")))
        assert both["words"] == wanted["words"] and both["segments"] and both["language"] == "en"
    for name in ("include", "include[]", "include[0]"):
        assert "logprobs" in ask(server, oai(FILE, field(name, "logprobs")))
    assert ask(server, oai(FILE, verbose, field("language", " ")))["language"] == "unknown"

def test_a_timeout_is_a_number_in_json_and_text_elsewhere(server):  # C192
    body = json.dumps({"features": ROWS[:30]}).encode()
    assert exchange(server, post_json(body, "/transcribe?timeout=99"))[0] == 200
    assert exchange(server, oai(FILE, field("timeout", "99"), path="/transcribe"))[0] == 200
    assert check_error(*exchange(server, post_json(body, "/transcribe?timeout=soon"))) == (422, "invalid_value")
    both = (post_json({"features": ROWS[:30], "timeout": 99}, "/transcribe?timeout=soon"),       # the body's counts
            oai(FILE, field("timeout", "99"), path="/transcribe?timeout=soon"))
    assert [exchange(server, raw)[0] for raw in both] == [200, 200]
    # the server's is the most
    for value, seconds in ((None, 30), (5.0, 5), ("5", 5), (30.0, 30), (31.0, 30), ("1e9", 30)):
        assert bodies.parse_timeout(value, 30.0) == seconds

def test_features_are_clamped_at_a_thousand_and_large_json_lets_others_work(monkeypatch):
    given = torch.tensor([[2000.0, -2000.0, 499.5, -499.5] * 10])
    system = serving_system()._replace(stats=torch.stack([torch.ones(40), 2 * torch.ones(40)]))
    assert torch.equal(bodies.prepare(system, given, "features"), (2 * (given - 1)).clamp(-1000, 1000))
    converted = []
    monkeypatch.setattr(bodies, "to_float", lambda text: converted.append(text) or float(text))
    for size in (2**19 - 1, 2**19):
        assert bodies.parse_json(b'{"a": 1}'.ljust(size)) == {"a": 1.0} and len(converted) == (size == 2**19)
    kinds = (b"", b"RIFF\0\0\0\0WAVE", b"RF64\0\0\0\0WAVE", b"RIFX\0\0\0\0WAVE", b"RIFF\0\0\0\0AVI ")
    assert [bodies.is_wav(start) for start in kinds] == [True, True, True, False, False]

# ---- serve: what the operator needs ----

def test_every_request_has_a_line_that_says_who_asked_what_and_how_it_ended():  # C193
    with serving(trusted_proxy=[ipaddress.ip_network("127.0.0.1")], max_connections=2) as server:
        body = json.dumps({"features": ROWS[:30]}).encode()
        raw = post("/transcribe", "application/json", body, "X-Request-Id: a\r\nX-Forwarded-For: 9.9.9.9, 7.7.7.7\r\n")
        text, ids = ask(server, raw)["text"], ["a"]
        for sent in (get(f"GET /no%0Away{'y' * 200}?key=secret HTTP/1.1", "X-Forwarded-For: <b>"),
                     b"GET\r\n\r\n" + get()):       # what follows a head that cannot be read is not taken up
            wait_until(lambda: len(server.lines) == len(ids) and not server.phases)     # written behind its answer
            ids.append(exchange(server, sent)[1]["x-request-id"])
        with contextlib.ExitStack() as held:
            wait_until(lambda: not server.phases)
            for _ in range(2):
                held.enter_context(connected(server))
            wait_until(lambda: len(server.phases) == 2)
            ids.append(exchange(server, get())[1]["x-request-id"])
    time_ = r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
    for line, wanted in zip(server.lines, (
            "INFO request id=a client=7.7.7.7 method=POST path=/transcribe status=200 ms=X batch=1",
            f'WARNING request id=X client=127.0.0.1 method=GET path="/no\\nway{"y" * 193}" status=404 ms=X '
            'error=not_found',
            "WARNING request id=X client=127.0.0.1 method=- path=- status=400 ms=X error=bad_framing",
            "ERROR request id=X client=127.0.0.1 method=- path=- status=503 ms=X error=overloaded"), strict=True):
        assert re.fullmatch(f"{time_} {re.escape(wanted).replace('=X', '=[0-9a-z.]+')}", line), line
    assert re.findall(" id=([^ ]+)", "\n".join(server.lines)) == ids
    assert text and not any(text in line or "secret" in line for line in server.lines)

@pytest.mark.parametrize("peer,forwarded,client", [
    ("10.0.0.1", "", "10.0.0.1"), ("10.0.0.1", "1.1.1.1", "1.1.1.1"),
    ("10.0.0.1", "6.6.6.6, 1.1.1.1, 10.0.0.2", "1.1.1.1"),
    ("1.2.3.4", "6.6.6.6", "1.2.3.4"), ("10.0.0.1", "6.6.6.6, nonsense", "10.0.0.1"), ("10.0.0.1", "::1", "::1"),
    ("::ffff:10.0.0.1", "1.1.1.1", "1.1.1.1"), ("10.0.0.1", "10.0.0.3", "10.0.0.3")])
def test_a_forwarded_address_counts_from_a_trusted_proxy_only(peer, forwarded, client):  # C193
    head = web.unread_head(peer)._replace(headers={"x-forwarded-for": forwarded})
    assert web.client_address(head, [ipaddress.ip_network("10.0.0.0/8")]) == client
    assert web.client_address(head, []) == peer.removeprefix("::ffff:")

def test_ready_says_when_the_model_is_loaded_and_who_comes_early_waits():  # C194
    with serving(loaded=False) as server, concurrent.futures.ThreadPoolExecutor(2) as pool:
        early = pool.submit(exchange, server, post_json({"features": ROWS[:30]}))
        found = exchange(server, get("GET /ready HTTP/1.1"))
        assert check_error(*found) == (503, "loading") and found[1]["retry-after"] == "1"
        health = ask(server, get())
        assert (health["status"], health["model"]) == ("loading", None) and not early.done()
        assert 'reason="' not in exchange(server, get("GET /metrics HTTP/1.1"))[2].decode()     # to ask is no load
        server.open(settings.Models(None, serving_system()))
        server.started -= 100       # seconds
        assert early.result()[0] == 200 and ask(server, get("GET /ready HTTP/1.1")) == {"status": "ready"}
        health = ask(server, get())
        wanted = {"status": "ok", "model": "paraformer", "feature_dim": 40, "sample_rate": 8000, "device": "cpu"}
        assert health.items() >= wanted.items() and 100 <= health["uptime"] < 9 * PATIENCE
        server.draining.set()
        assert check_error(*exchange(server, get("GET /ready HTTP/1.1"))) == (503, "draining")
    with serving(loaded=False, request_timeout=0.2) as hasty:
        assert check_error(*exchange(hasty, post_json({"features": ROWS[:30]}))) == (503, "loading")

class Recorded(list):
    """A log that keeps what it is told."""
    write = list.append

    def __call__(self, level: str, event: str, **fields) -> None:
        self.append((level, event, fields))

def test_the_model_is_loaded_as_the_options_say_warmed_and_named(ckpt, monkeypatch):  # C194
    calls, said = [], []
    monkeypatch.setattr(serve, "load_system", lambda *given, **more: calls.append((*given, more)) or serving_system())
    monkeypatch.setattr(serve, "recognise_batch", lambda system, feats: calls.append(feats[0].shape))
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    options = serve_options(checkpoint=ckpt, device="cuda", dtype="int8", threads=3)
    log = Recorded()
    server = serve.start(serve.Server(options, log))
    server.batcher.run = calls.clear        # the thread goes on to the queue
    os.utime(ckpt, (10**9, 10**9))
    wake, failures = os.open(os.devnull, os.O_WRONLY), []
    monkeypatch.setattr(server, "open", lambda *given: said.extend(calls) or serve.Server.open(server, *given))
    serve.serve_model(server, failures, wake)
    os.close(wake)
    assert (failures, calls, said) == ([], [], [3, (ckpt, "cuda", "int8", {"laid_out": True}), (50, 40)])
    card = {"id": "paraformer", "object": "model", "created": 10**9, "owned_by": "local"}
    assert ask(server, get("GET /v1/models/paraformer HTTP/1.1")) == card
    assert ask(server, get("GET /v1/models HTTP/1.1")) == {"object": "list", "data": [card]}
    line = (f"listening on http://127.0.0.1:{server.server_address[1]} (paraformer, {ckpt}, cpu, "
            "trained on recordings at 8000 Hz)")
    for options.log_format, wanted in (("json", [("INFO", "ready", {"message": line})]),
                                       ("text", [line, ("INFO", "ready", {})])):
        log.clear()
        serve.announce(server, log)
        assert log == wanted
    serve.drain(server, 1.0)

def test_a_toy_checkpoint_refuses_recordings_and_says_what_it_was_trained_on():  # C195
    with serving(serving_system(kind="toy")) as toy:
        assert ask(toy, get())["trained_on"] == "toy features"
        assert exchange(toy, post_json({"features": ROWS[:30]}))[0] == 200
        for raw in (oai(FILE), post("/transcribe", "audio/wav", wav(NOISE))):
            found = exchange(toy, raw)
            assert check_error(*found) == (400, "toy_checkpoint") and b"trained on toy features" in found[2]
    system = serving_system()
    assert serve.trained_on(system) == "recordings at 8000 Hz"
    named = replace(system.config.data, train="/home/me/digits/train.jsonl")
    assert serve.trained_on(system._replace(config=replace(system.config, data=named))) == "train.jsonl at 8000 Hz"

# ---- serve: OpenAI's forms ----

SPOKEN = [report.Token(*t) for t in (("▁one", 7, 0.5, 0.1, 0.4), ("▁two", 9, 0.8, 0.4, 1.2),
                                     ("▁six", 8, 1.0, 61.0, 61.5))]
SPOKEN_WORDS = [report.Word(t.token[1:], t.start, t.end, t.confidence) for t in SPOKEN]

def test_openai_formats_by_hand():  # C57
    kinds = {}

    def body(**changes) -> str:
        result = report.Result("one two six", 0.7, SPOKEN, SPOKEN_WORDS)
        form = openai_forms.parse_openai_form({"language": ["en"]})._replace(**changes)
        response = openai_forms.openai_response(result, 62.50041, form)
        assert response.status == 200
        kinds["stream" if form.stream else form.response_format] = response.media_type.removesuffix("; charset=utf-8")
        return response.body.decode()

    usage = {"type": "duration", "seconds": 62.5}
    assert json.loads(body()) == {"text": "one two six", "usage": usage}
    assert body(response_format="text") == "one two six\n"
    assert body(response_format="srt") == ("1\n00:00:00,100 --> 00:00:01,200\none two\n\n"
                                  "2\n00:01:01,000 --> 00:01:01,500\nsix\n\n")
    assert body(response_format="vtt").startswith("WEBVTT\n\n1\n00:00:00.100 --> 00:00:01.200\none two\n")
    verbose = json.loads(body(response_format="verbose_json", granularities=["segment", "word"], temperature=0.5))
    assert verbose["duration"] == 62.5 and verbose["usage"] == usage
    assert verbose["words"][1] == {"word": "two", "start": 0.4, "end": 1.2, "confidence": 0.8}
    assert verbose["segments"][0] == {
        "id": 0, "seek": 0, "start": 0.1, "end": 1.2, "text": "one two", "tokens": [7, 9], "temperature": 0.5,
        "avg_logprob": round((math.log(0.5) + math.log(0.8)) / 2, 4), "no_speech_prob": 0.0,
        "compression_ratio": round(7 / len(zlib.compress(b"one two")), 4)}
    assert [(segment["id"], segment["tokens"]) for segment in verbose["segments"]] == [(0, [7, 9]), (1, [8])]
    assert openai_forms.segment_entries(report.Result("one", 0.7, [], SPOKEN_WORDS), 0.0)[0]["avg_logprob"] == 0.0
    assert "segments" not in json.loads(body(response_format="verbose_json", granularities=["word"]))
    assert {"segments", "words"} & set(json.loads(body(response_format="verbose_json"))) == {"segments"}
    logprobs = json.loads(body(logprobs=True))["logprobs"]
    assert logprobs[0] == {"token": "▁one", "bytes": list("▁one".encode()), "logprob": -0.6931}
    deltas = [json.loads(line[6:]) for line in body(stream=True).split("\n\n") if line]
    assert [d["type"] for d in deltas] == ["transcript.text.delta", "transcript.text.done"]
    assert deltas[1]["text"] == "one two six"
    assert kinds == {"json": "application/json", "verbose_json": "application/json", "text": "text/plain",
                     "srt": "text/plain", "vtt": "text/vtt", "stream": "text/event-stream"}

@pytest.fixture(scope="module")
def hotword_server():
    with serving(kit_system("seaco"), max_wait_ms=500.0) as started:
        yield started

def hotword_case(case: str) -> tuple[list[str], list[int], bytes]:
    """A list's phrases, what FunASR hears in fsdd_dev_a with it, that recording."""
    return (hotword_phrases("seaco", case), results_by_recording("seaco")["fsdd_dev_a"]["hot"][case]["ids"],
            kit("wavs/fsdd_dev_a.wav").read_bytes())

def test_hotwords_come_as_a_list_as_text_in_a_form_and_as_openais_prompt(hotword_server):  # C156
    phrases, ids, recording = hotword_case("several")
    file = ('name="file"; filename="a.wav"', recording)
    query = "/transcribe?hotwords=" + urllib.parse.quote(",".join(phrases))
    for request in (oai(field("hotwords", "\n".join(phrases)), file, path="/transcribe"),
                    oai(*(field("hotwords[]", phrase) for phrase in phrases), file, path="/transcribe"),
                    post(query, "audio/wav", recording)):
        answered = ask(hotword_server, request)
        assert [token["id"] for token in answered["tokens"]] == ids and "warning" not in answered
        assert [token.get("hotword") for token in answered["tokens"]] == [None, True, *[None] * 5]
    text = results_by_recording("seaco")["fsdd_dev_a"]["hot"]["several"]["text"]
    plain = results_by_recording("seaco")["fsdd_dev_a"]["hot"]["none"]["text"]
    unknown = decode.transcribe_recording(hotword_server.models.whole._replace(hotwords=("你",)), recording).text
    for fields, wanted in (([field("prompt", ", ".join(phrases))], text),
                           ([field("hotwords", "，".join(phrases))], text),
                           ([field("prompt", "")], plain),
                           ([field("hotwords", "你"), field("prompt", phrases[0])], unknown)):
        assert ask(hotword_server, oai(*fields, file))["text"] == wanted
    named = '"the vocabulary cannot spell, so these hotwords help little: \\u4f60'
    wait_until(lambda: any(named in line for line in hotword_server.lines))         # logged behind the answer
    half = ask(hotword_server, post_json({"features": [[0.0] * 560] * 3, "hotwords": ["\ud800"]}))
    assert ": \ud800 (" in half["warning"]        # half a surrogate pair, which UTF-8 lacks

def test_lists_of_hotwords_share_a_batch_and_are_encoded_once(hotword_server):  # C156
    feats = recorded("seaco", "fsdd_dev_a")["feats"]
    stats = hotword_server.models.whole.stats
    raw = (feats / stats[1] + stats[0]).tolist()
    cases = ("none", "one", "several", "many", "empty")
    items = [{"features": raw, "hotwords": None if case == "none" else hotword_phrases("seaco", case)}
             for case in cases]
    before = hotword_server.models.whole.encode_list.cache_info()
    for _ in range(3):
        answers = ask(hotword_server, post_json({"batch": items}))["results"]
        assert {answer["timing"]["batch_size"] for answer in answers} == {5}
        for case, answer in zip(cases, answers):
            expected = results_by_recording("seaco")["fsdd_dev_a"]["hot"][case]
            assert [token["id"] for token in answer["tokens"]] == expected["ids"]
    after = hotword_server.models.whole.encode_list.cache_info()
    assert after.misses - before.misses <= 4 <= 8 <= after.hits - before.hits and after.maxsize == hotwords.KEPT

@pytest.mark.parametrize("value, code", [
    (["a"] * 1001, "too_many_hotwords"), (["a", "字" * 65, "b"], "too_many_hotwords"), (["a", 1], "invalid_type"),
    (7, "invalid_type"),
    ({"a": 1}, "invalid_type"), ("字" * 65, "too_many_hotwords")])
def test_hotwords_of_a_wrong_kind_or_too_many_are_422(hotword_server, value, code):  # C156
    status, _, body = exchange(hotword_server, post_json({"features": [[0.0] * 560] * 3, "hotwords": value}))
    error = json.loads(body)["error"]
    assert (status, error["code"], error["param"]) == (422, code, "hotwords")

def test_hotwords_for_a_model_that_takes_none_are_422_and_a_prompt_is_ignored(server):  # C156
    for request in (post_json({"features": [Z], "hotwords": ["a"]}), oai(field("hotwords", "a"), FILE)):
        found = exchange(server, request)
        assert (check_error(*found) == (422, "no_hotwords")
                and b"hotwords: wanted" in found[2] and b"paraformer-zh" in found[2])
    assert exchange(server, oai(field("prompt", "a, b"), FILE))[0] == 200
    takes = serving_system()._replace(encode_list=print)
    assert bodies.parse_hotwords(["字" * 64] * 1000, takes, "hotwords") == ("字" * 64,) * 1000
    for path, told in (("/transcribe", None), ("/v1/audio/transcriptions", ("a",))):        # a prompt is OpenAI's
        assert bodies.told_hotwords([bodies.Upload([], 1.0)], {"prompt": "a"}, takes, path)[0].hotwords == told

def test_a_published_vocabulary_is_answered_with_its_pieces_and_words():
    system = kit_system("sanm")
    feats = recorded("sanm", WAVS[0])["feats"]
    found, wanted = transcribe.recognise_batch(system, [feats])[0].result, decode.transcribe(system, [feats])[0]
    assert found == wanted and " ".join(word.text for word in found.words) != "" and "@@" not in found.text
    verbose = openai_forms.parse_openai_form({"response_format": ["verbose_json"], "timestamp_granularities": ["word"]})
    body = json.loads(openai_forms.openai_response(found, 9.0, verbose).body)
    assert body["words"] == [report.word_entry(word) for word in wanted.words] and body["text"] == wanted.text

def test_word_tokens_are_marked_so_that_they_spell_the_text():  # C53
    system = serving_system("word")
    found = transcribe.recognise_batch(system, [torch.from_numpy(np.array(ROWS)).float()])[0].result
    assert len(found.text.split()) > 2
    assert "".join(t.token for t in found.tokens).replace("▁", " ").strip() == found.text

def test_every_route_answers_with_sentences(tmp_path):
    """The answers are those of decode.py; segments of verbose_json are sentences."""
    system, path = pipeline_system("bicif"), kit_wav(tmp_path, "talk_b")
    result = sentences.with_sentences(system.punctuation, decode.transcribe_recording(system, path))
    written = report.written_text(result)
    assert len(result.sentences) > 3
    with serving(system) as running:
        direct = ask(running, post("/transcribe", "audio/wav", path.read_bytes()))
        assert direct["text"] == written and direct["sentences"] == report.sentence_entries(result)
        file = ('name="file"; filename="a.wav"', path.read_bytes())
        verbose = ask(running, oai(file, field("response_format", "verbose_json")))
        assert verbose["text"] == written
        assert [(s["text"], s["start"], s["end"]) for s in verbose["segments"]] == [s[:3] for s in result.sentences]
        assert sum(len(s["tokens"]) for s in verbose["segments"]) == len(result.tokens)
        subtitles = exchange(running, oai(file, field("response_format", "srt")))[2].decode()
        assert subtitles == report.subtitles(result, "srt")
        quiet = ask(running, post("/transcribe", "audio/wav", kit_wav(tmp_path, "silence").read_bytes()))
        assert (quiet["text"], quiet["sentences"], quiet["frames"]) == ("", [], 0)
        rows = np.random.default_rng(0).standard_normal((40, 560)).tolist()
        batch = ask(running, post_json({"batch": [{"features": rows}, {"features": rows[:30]}]}))
        assert all("sentences" in item for item in batch["results"])

def test_serve_loads_both_parts():
    arguments = ["--checkpoint", str(kit("sanm")), "--vad", str(kit("vad")), "--vad-schedule", "funasr",
                 "--punctuate", str(kit("punc")), "--device", "cpu"]
    system = serve.load_warm(serve.parse_arguments(arguments)).whole
    assert system.vad.schedule == vad.SCHEDULE and system.punctuation.end == 3

# ---- serve: the page, in a browser ----

class Browser:
    """Headless chromium, spoken to over its debugging pipe: JSON messages that end in NUL on descriptors 3 and 4."""

    def __init__(self, folder: Path, *flags: str):
        to_read, self.to = os.pipe()
        self.source, from_write = os.pipe()
        command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
                   "--no-first-run", f"--user-data-dir={folder}", "--autoplay-policy=no-user-gesture-required", *flags]
        script = f'exec 3<&{to_read} 4>&{from_write}; exec "$@"'
        self.process = subprocess.Popen(["bash", "-c", script, "bash", *command], pass_fds=(to_read, from_write),
                                        stderr=subprocess.DEVNULL)
        os.close(to_read), os.close(from_write)
        self.rest, self.count, self.events, self.session = b"", 0, [], None

    def call(self, method: str, **params) -> dict:
        self.count += 1
        message = {"id": self.count, "method": method, "params": params,
                   **({"sessionId": self.session} if self.session else {})}
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                assert select.select([self.source], [], [], PATIENCE)[0], f"chromium does not answer {method}"
                self.rest += os.read(self.source, 2**20)
            line, _, self.rest = self.rest.partition(b"\0")
            got = json.loads(line)
            if got.get("id") == self.count:
                assert "error" not in got, got
                return got["result"]
            self.events.append(got)

    def run(self, script: str):
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True,
                          userGesture=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def open(self, server, path: str = "/", width: int = 1100, height: int = 900, dark: bool = False) -> str:
        """The page of a server in a new tab, once it has heard of the server's health -> its address."""
        url = "http://%s:%d%s" % (*server.server_address[:2], path)
        self.session, self.events = None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 500)
        self.call("Emulation.setEmulatedMedia",
                  features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.call("Page.navigate", url=url)
        self.wait("location.protocol === 'http:' && document.querySelector('#state.ok, #state.bad')")
        return url

    def wait(self, condition: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not self.run(f"!!({condition})"):
            assert time.monotonic() < deadline, (condition, self.run("document.body.innerText"))
            time.sleep(0.05)

    def drop(self, content: bytes, name: str, kind: str = "") -> None:
        """A file dropped onto the page."""
        self.run(f"""(() => {{
            const bytes = Uint8Array.from(atob("{base64.b64encode(content).decode()}"), c => c.charCodeAt(0));
            const file = new File([bytes], {json.dumps(name)}, {{ type: "{kind}" }});
            const transfer = new DataTransfer(); transfer.items.add(file);
            const event = new DragEvent("drop", {{ dataTransfer: transfer, bubbles: true, cancelable: true }});
            document.getElementById("drop").dispatchEvent(event); }})()""")

    def complaints(self) -> list:
        """Console errors, exceptions and errors in the log."""
        return [event for event in self.events if event["method"] == "Runtime.exceptionThrown"
                or event["method"] == "Runtime.consoleAPICalled" and event["params"]["type"] == "error"
                or event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] == "error"]

    def requests(self) -> set:
        sent = [event for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return {event["params"]["request"]["url"] for event in sent}

    def close(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)
        os.close(self.to), os.close(self.source)

@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Its microphone plays speech of the kits, and noise without them."""
    if shutil.which("chromium") is None:
        pytest.skip("chromium is not installed (apt-get install -y chromium)")
    folder = tmp_path_factory.mktemp("chromium")
    speech = KIT / "wavs/libri_dev.wav" if KIT.is_dir() else folder / "microphone.wav"
    if not speech.exists():
        speech.write_bytes(wav(np.tile(NOISE, 4)))
    started = Browser(folder / "profile", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
                      f"--use-file-for-fake-audio-capture={speech}")
    try:
        yield started
    finally:
        started.close()

DONE = "document.querySelectorAll('.token').length && !$('detail').hidden"

def test_page_shows_a_dropped_and_a_recorded_utterance(server, browser):
    url = browser.open(server, width=360, height=800, dark=True)
    browser.wait("RATE === 8000")       # the model's, and the recording's: nothing is resampled
    hostile = '<img src=x onerror="document.title=1">.wav'
    browser.drop(wav(NOISE), hostile)
    browser.wait(DONE)
    found = ask(server, post("/transcribe", "audio/wav", wav(NOISE)))
    tokens = browser.run("[...document.querySelectorAll('#transcript .token')].map("
                         "t => ({...t.dataset, colour: getComputedStyle(t).backgroundColor}))")
    assert [[float(t["start"]), float(t["end"])] for t in tokens] == [[t["start"], t["end"]] for t in found["tokens"]]
    assert all(0 <= float(t["confidence"]) <= 1 and float(t["start"]) <= float(t["end"]) for t in tokens)
    assert all(t["colour"] != "rgba(0, 0, 0, 0)" for t in tokens)
    assert browser.run("$('name').textContent") == hostile
    assert browser.run("document.images.length") == 0
    assert browser.run("document.documentElement.scrollWidth") <= 360
    assert browser.run("new Set([...document.querySelectorAll('[data-export]')].map(b => b.offsetTop)).size") == 1
    painted = "new Set($('picture').getContext('2d').getImageData(0, {}, 300, 60).data).size"
    assert browser.run(painted.format(20)) > 3 and browser.run(painted.format(134)) > 3         # the wave; the weights
    browser.run("const play = audio.play; audio.onplaying = () => { window.played = true; }; "
                "audio.play = () => { window.from = audio.currentTime; return play.call(audio); }")
    browser.run("document.querySelectorAll('.token')[2].click()")
    browser.wait("window.played && Math.abs(window.from - %s) < 0.01" % tokens[2]["start"])
    browser.run("$('record').click()")
    browser.wait("recorder?.state === 'recording' && $('record').textContent.startsWith('Stop')")
    browser.run("new Promise(done => setTimeout(done, 1200))")
    browser.run("$('record').click()")
    browser.wait(f"$('name').textContent.startsWith('recording') && {DONE}")
    for text, tokens in (("hello a 你好 b", ["hel@@", "lo", "a", "你", "<unk>", "好", "b"]), ("a b", ["a", " ", "b"]),
                         ("one two", ["one", "▁two"]), ("an 要 a@@", ["an@@", "要", "a@@@@"])):
        made = [{"token": token, "confidence": 1, "start": 0, "end": 1} for token in tokens]
        answer = json.dumps({"text": text, "tokens": made})
        shown = browser.run(f"transcript({answer}).map(e => e.textContent ?? e).join('')")
        assert shown.replace("<unk>", "") == text
    browser.drop(b"not audio", "b.wav")
    browser.wait("!$('error').hidden && !document.querySelector('.token')")
    assert not browser.complaints(), browser.complaints()
    assert all(request.startswith((url, "data:", "blob:")) for request in browser.requests())

class Proxied(serve.Server):
    """As behind a proxy: its paths begin with /asr, and form data is too large for the proxy, which answers in HTML."""

    def admit(self, head: web.Head) -> None:
        super().admit(head._replace(path=head.path.removeprefix("/asr")))

    def answer(self, head: web.Head, body: bytes, has_left) -> web.Response:
        if web.media_type(head) == "multipart/form-data":
            return web.Response(413, "text/html", b"<html><h1>413 Request Entity Too Large</h1></html>")
        return super().answer(head._replace(path=head.path.removeprefix("/asr")), body, has_left)

def test_page_works_behind_a_prefix_asks_for_the_key_and_shows_what_is_no_json(browser, monkeypatch):  # C197
    monkeypatch.setattr(serve, "Server", Proxied)
    monkeypatch.setenv("ASR_API_KEY", "secret")
    with serving() as proxied:
        url = browser.open(proxied, "/asr/")
        browser.wait("$('state').textContent.includes('trained on recordings at 8000 Hz')")
        assert "up to 60 s" in browser.run("$('hint').textContent")
        browser.drop(wav(NOISE), "a.wav")
        browser.wait("!$('ask').hidden")
        browser.run("$('key').value = 'secret'; document.querySelector('#ask button').click()")
        browser.wait(DONE)
        browser.run("document.querySelector('[data-export=srt]').click()")
        browser.wait("$('error').textContent.includes('answered 413')")
        assert all(request.startswith((url, "data:", "blob:")) for request in browser.requests())

def test_page_takes_what_it_says_and_lets_the_server_read_what_the_browser_cannot(server, browser):  # C197
    browser.open(server)
    hint = browser.run("$('hint').textContent")
    for name in ("wav", "mp3", "m4a", "ogg", "opus", "flac", "webm", "wma"):
        assert name == "wma" or name in hint
        browser.drop(wav(NOISE) if name == "wav" else encoded(name), f"a.{name}", f"audio/{name}")
        browser.wait(f"$('name').textContent === 'a.{name}' && {DONE}")
    assert not browser.complaints(), browser.complaints()

def test_page_of_a_toy_checkpoint_says_that_it_takes_no_recordings(browser):  # C197
    """Also one that was opened before the checkpoint was loaded."""
    with serving(loaded=False) as toy:
        browser.open(toy)
        assert browser.run("$('state').textContent") == "loading"
        toy.open(settings.Models(None, serving_system(kind="toy")))
        browser.wait("modes.length && $('hint').textContent.includes('takes no recordings')")
        browser.drop(wav(NOISE), "a.wav")
        browser.wait("$('error').textContent.includes('trained on toy features')")

def saved_wav(browser) -> bytes:
    """What the page has of a recording."""
    return base64.b64decode(browser.run("""new Promise(done => { const reader = new FileReader();
        reader.onload = () => done(reader.result.split(",")[1]); reader.readAsDataURL(shown.wav); })"""))

@pytest.mark.parametrize("offline", [None, "sanm"])
def test_page_shows_words_as_they_are_spoken(tmp_path, browser, monkeypatch, offline):  # C211
    """The last text is decode.py's of what the page has recorded: by the streaming model, or, in a second pass, by the
    other one. So is that of a file. A wrong key is asked for before."""
    monkeypatch.setenv("ASR_API_KEY", "sec&ret")
    system = kit_system("streaming")
    whole = offline and kit_system(offline)

    def check_result(name):
        browser.wait(f"$('name').textContent.startsWith('{name}') && !recorder && {DONE}")
        (tmp_path / "said.wav").write_bytes(saved_wav(browser))
        wanted = decode.transcribe_recording(whole or system, tmp_path / "said.wav").text
        shown = browser.run("$('transcript').textContent")
        assert wanted and browser.run("shown.found.text") == wanted and shown.replace("<unk>", "") == wanted

    with serving(settings.Models(system, whole)) as server:
        browser.open(server, width=360, dark=True)
        browser.run("$('record').click()")
        browser.wait("!$('ask').hidden && !recorder")
        browser.run("$('key').value = 'sec&ret'; document.querySelector('#ask button').click()")
        browser.wait("recorder && document.querySelector('#transcript .open')?.parentElement.textContent.length > 2")
        assert browser.run("document.documentElement.scrollWidth") <= 360
        browser.run("$('record').click()")
        check_result("recording")
        assert browser.run("document.querySelector('[data-export=srt]').hidden") is (offline is None)
        browser.drop((tmp_path / "said.wav").read_bytes(), "said.wav")
        check_result("said.wav")
    assert {event["params"]["entry"]["text"] for event in browser.complaints()} == {
        "Failed to load resource: the server responded with a status of 401 (Unauthorized)"}

# ---- sessions: what FunASR's clients send and get, over a socket ----

@functools.cache
def socket_models(*parts: str) -> settings.Models:
    """The kit's streaming model, and beside it, with "whole", sanm, with "vad", "punc" or "punc_realtime"."""
    if not parts:
        return settings.Models(kit_system("streaming"), None)
    whole = kit_system("sanm")._replace(segment_sec=(0.5, 2.5))
    if "vad" in parts:
        whole = whole._replace(vad=kit_vad())
    if parts[-1].startswith("punc"):
        whole = whole._replace(punctuation=kit_punctuation(parts[-1]))
    return settings.Models(kit_system("streaming"), whole)

def pcm_of(samples: torch.Tensor) -> bytes:
    return (samples * 32768).round().clamp(-32768, 32767).to(torch.int16).numpy().tobytes()

def kit_speech(seconds: float = 4.0) -> torch.Tensor:
    return streaming_cases("streaming")["aishell_dev"][0][:int(16000 * seconds)]

def test_a_client_that_appends_has_the_text_of_the_stream_and_its_socket_stays_open():  # C200
    """Oracle: the samples through `streaming.feed`, whole; over one socket, cut into odd numbers of bytes."""
    system, samples = kit_system("streaming"), kit_speech()
    with serving(socket_models()) as server, Talker(server, "/ws") as client:
        assert client.status == 101
        for size, sizes, chunk in ((1921, [0, 10, 5], streaming.Chunk()),
                                   (30001, "5, 8,4", streaming.Chunk(8, 4, old=5))):
            wanted = stream_through(system, chunk, [samples])[0][0]
            settings = {"mode": "online", "chunk_size": sizes, "chunk_interval": 10, "encoder_chunk_look_back": 4,
                        "decoder_chunk_look_back": 1, "wav_name": "a", "wav_format": "pcm", "audio_fs": 16000,
                        "is_speaking": True, "hotwords": "", "itn": True}
            messages = client.say(settings, pcm_of(samples), size)
            assert {(m["mode"], m["wav_name"]) for m in messages} == {("online", "a")} and len(messages) > 4
            assert all(m["text"] or m["tokens"] for m in messages[:-1])
            assert "".join(m["text"] for m in messages) == messages[-1]["text_so_far"] == wanted.text
            tokens = [token for m in messages for token in m["tokens"]]
            assert tokens == list(map(report.token_entry, wanted.tokens))
            times = [span for m in messages if m["timestamp"] for span in json.loads(m["timestamp"])]
            assert times == [[round(1000 * t.start), round(1000 * t.end)] for t in wanted.tokens]
            assert all(m["latency_ms"] >= 0 for m in messages)
        client.send({"is_speaking": False, "is_end": True})         # an utterance of nothing has a last message too
        last, ending = client.read(), client.read()
        assert (last["text"], last["tokens"], last["is_final"], last["mode"]) == ("", [], True, "online")
        assert ending == {"mode": "online", "wav_name": "a", "is_final": True, "is_end": True}

@pytest.mark.parametrize("rate_hz", [8000, 11025, 48000])
def test_any_rate_is_resampled_as_a_stream(rate_hz):  # C200
    """Oracle: the samples resampled whole."""
    data = pcm_of(audio.resample(kit_speech(3.0), 16000, rate_hz))
    samples = torch.from_numpy(np.frombuffer(data, "<i2").astype(np.float32) / 32768)
    resampled = audio.resample(samples, rate_hz, 16000)
    wanted = stream_through(kit_system("streaming"), streaming.Chunk(), [resampled])[0][0]
    with serving(socket_models()) as server, Talker(server) as client:
        messages = client.say({"audio_fs": rate_hz}, data, 3333)
        assert "".join(m["text"] for m in messages) == wanted.text and len(messages) > 1

@pytest.mark.parametrize("parts", [("whole",), ("whole", "vad"), ("whole", "vad", "punc"), ("whole", "punc_realtime")])
def test_the_second_pass_gives_each_segment_what_a_recording_has_there(tmp_path, monkeypatch, parts):  # C203
    """Oracle: decode.py's cutting and recognition of the whole recording, and what a client shows as FunASR's does."""
    models = socket_models(*parts)
    samples = long_samples("talk_b")[16000 * 4:16000 * 15]
    path = tmp_path / "a.wav"
    audio.save_wav(path, samples, 16000)
    segments, cuts = [], list(decode.cut_recording(models.whole, path))
    all_feats = [audio.frontend(one.samples, 16000, models.whole.config.data, models.whole.stats) for one in cuts]
    for feats in all_feats:
        segments += decode.transcribe(models.whole, [feats])
    whole = decode.transcribe_recording(models.whole, path)
    texts = [result.text for result in segments]
    if "punc" in parts:
        texts = [report.written_text(sentences.with_sentences(models.whole.punctuation, result)) for result in segments]
    carried: list[str] = []
    for i, text in enumerate(texts if "punc_realtime" in parts else []):
        texts[i], _, carried = punctuation.punctuate_more(models.whole.punctuation, carried, text)
    at_once, hear = set(), vad.feed
    monkeypatch.setattr(vad, "feed", lambda *given, **more: at_once.add(given[0].piece_ms) or hear(*given, **more))
    pieces, cut = [], streams.cut

    def cut_and_keep(*given):
        stream, found = cut(*given)
        pieces.extend(found)
        assert len(stream.held) == stream.heard - stream.first <= 16000 * 3.1      # the longest segment, and ahead
        assert not found or stream.online is None or len(stream.pending) == stream.heard - stream.begun
        return stream, found

    monkeypatch.setattr(streams, "cut", cut_and_keep)
    with serving(models) as server, Talker(server) as client:
        messages = client.say({"wav_name": "b", "chunk_size": [5, 10, 5]}, pcm_of(samples))
        assert [(x.start_sec, x.seconds) for x in pieces] == [(x.start_sec, len(x.samples) / 16000) for x in cuts]
        assert all(torch.equal(x.feats, feats) for x, feats in zip(pieces, all_feats))
        starts = [token["start"] for m in messages if m["mode"] == "2pass-online" for token in m["tokens"]]
        assert 8 < max(starts) < 11 and len(starts) > 5
        assert at_once == ({100} if "vad" in parts else set())      # ms of a VAD's step
        second = [m for m in messages if m["mode"] == "2pass-offline"]
        assert {m["mode"] for m in messages} == {"2pass-online", "2pass-offline"} and len(second) > 2
        assert [m["text"].strip() for m in second if m["text"]] == [text.strip() for text in texts if text.strip()]
        assert [m["is_final"] for m in messages] == [False] * (len(messages) - 1) + [True]
        times = [span for m in second if m["timestamp"] for span in json.loads(m["timestamp"])]
        assert times == [[round(1000 * word.start), round(1000 * word.end)] for word in whole.words]
        settled = shown = ""
        for m in messages:      # as funasr_wss_client.py does
            shown = shown + m["text"] if m["mode"] == "2pass-online" else ""
            settled += m["text"] * (m["mode"] == "2pass-offline")
            assert m["text_so_far"].startswith(settled) and (m["text_so_far"] == settled + shown or m["tokens"])
        assert settled == messages[-1]["text_so_far"]
        direct = ask(server, post("/transcribe", "audio/wav", path.read_bytes()))["text"]
        for settings, data in (({"mode": "offline"}, pcm_of(samples)), ({"wav_format": "wav"}, path.read_bytes())):
            only, = client.say(settings, data)
            assert (only["mode"], only["text"], only["text_so_far"]) == ("offline", direct, direct)

def test_what_is_refused_is_said_and_the_socket_goes_on():  # C204
    invalid = {"mode": ["2pass", 1], "audio_fs": ["16000", True, 16000.0], "wav_name": [5], "wav_format": [None],
               "is_speaking": [1], "is_end": ["yes"], "encoder_chunk_look_back": [-1],
               "decoder_chunk_look_back": ["1", -1],
               "chunk_size": [[5, 10], "5,10,x", [0, 10, 0], [0, 10.0, 5], {}, [-1, 10, 5]]}
    refused = [({name: value}, "invalid_value") for name, values in invalid.items() for value in values]
    refused += [(text, "invalid_json") for text in ("{", "[1]", "[" * 9000, "{}".ljust(65537))]
    refused += [({"hotwords": "我们"}, "no_hotwords"), ({"hotwords": '{"a":' * 9000}, "invalid_value")]
    system = kit_system("streaming")
    samples = kit_speech(2.0)
    with serving(socket_models()) as server, Talker(server) as client:
        for sent, code in refused:
            client.send(sent)
            answer = client.read()
            error = answer.pop("error")
            assert answer == {"text": "", "is_final": False} and set(error) == {"message", "type", "param", "code"}
            assert (error["code"], error["type"]) == (code, "invalid_request_error"), sent
            if isinstance(sent, dict):
                assert error["param"] in (*sent, "chunk_size"), sent
        client.send('{"chunk_size": [0, 10, 5], "unknown": {}}'.ljust(65536))
        messages = client.say({"wav_name": "\ud800"}, pcm_of(samples))
        assert messages[-1]["wav_name"] == "\ud800"
        assert messages[-1]["text_so_far"] == stream_through(system, streaming.Chunk(), [samples])[0][0].text
        assert not any("error" in message for message in messages)
        client.send({"wav_format": "mp3", "mode": "online"})        # a file is for mode offline
        client.send(b"ID3" + bytes(50000))
        client.send(bytes(9))                   # of what has failed no more is heard
        client.send({"is_speaking": False, "is_end": True})
        error, last, ending = client.read(), client.read(), client.read()
        assert (error["error"]["param"] == "wav_format" and last["is_final"]
                and not ending["is_final"] and ending["error"])

@pytest.mark.parametrize("taken, refused", [
    ({"audio_fs": 8000}, {"audio_fs": 7999}), ({"audio_fs": 48000}, {"audio_fs": 48001}),
    ({"wav_name": "a" * 1000}, {"wav_name": "a" * 1001}), ({"wav_format": "a" * 1000}, {"wav_format": "a" * 1001}),
    ({"chunk_size": [4, 91, 5]}, {"chunk_size": [4, 92, 5]}), ({"chunk_size": "0,99,1"}, {"chunk_size": "0,99,2"}),
    ({"chunk_size": [0, 1, 1]}, {"chunk_size": [0, 1, 0]}), ({"chunk_size": [1, 1, 1]}, {"chunk_size": [-1, 1, 1]}),
    ({}, {"chunk_size": 5}), ({"encoder_chunk_look_back": 10}, {"encoder_chunk_look_back": 11}),
    ({"decoder_chunk_look_back": 10}, {"decoder_chunk_look_back": 11}), ({"hotwords": ""}, {"hotwords": "a"})])
def test_each_setting_has_its_limit(taken, refused):  # C204
    """Hz; characters; frames of a window, and of the chunks that are looked back at."""
    models = socket_models()
    start = settings.first_settings(models)._replace(chunk=streaming.Chunk(encoder_look_back=1, decoder_look_back=1))
    assert settings.read_settings(start, taken, models)[1] == []
    found, errors = settings.read_settings(start, {**refused, "mode": "online"}, models)
    assert found == start and [error.status for error in errors] == [422]

def test_a_file_over_a_socket_has_the_limit_of_a_body_and_steps_of_600_ms_where_no_chunk_is_due(server):
    with Talker(server) as client:
        for rest, code in ((b"a", "unsupported_format"), (b"ab", "body_too_large")):
            for sent in ({"wav_format": "mp3"}, bytes(2**20 - 1), rest, {"is_speaking": False}):
                client.send(sent)
            assert client.read()["error"]["code"] == code and client.read()["is_final"]
    stream = streams.start_stream(server.models, settings.first_settings(server.models)._replace(audio_fs=8000))
    assert streams.samples_due(server.models, stream) == 4800

def test_a_session_hears_what_is_due_writes_spaces_between_segments_and_ends_in_its_mode():
    """600 ms at 8 kHz are 9,600 bytes; Chinese stops need no space around them."""
    models = settings.Models(None, serving_system("word"))
    start, heard = settings.first_settings(models)._replace(audio_fs=8000), []
    session = sessions.Session(SimpleNamespace(models=models), web.unread_head(), None)

    def hear(count: int, is_last: bool) -> list:
        heard.append((count, is_last))
        del session.received[:2 * count]
        return []

    session.settings, session.hear = start, hear
    for size, count in ((9599, 0), (1, 1), (19201, 3)):
        assert list(session.take_audio(bytes(size))) == [] and heard == [(4800, False)] * count
    assert len(session.received) == 1
    session.begin()
    for mode, told in (("2pass", "2pass-offline"), ("online", "online"), ("offline", "offline")):
        session.settings = start._replace(mode=mode)
        last, = session.finish()
        assert (last["mode"], last["is_final"], last["timestamp"]) == (told, True, "")
    for written, text, wanted in (("", "one", "one"), ("one", "two", " two"), ("one", "", ""), ("one，", "two", "two"),
                                  ("one", "。two", "。two")):
        session.written = written
        assert session.behind_written(text) == wanted
    assert session.recognise_piece(torch.zeros(0, 40), None) == report.Result("", 0.0, [], [])
    session.begin()
    session.stream = SimpleNamespace(settings=start._replace(mode="2pass"))
    for is_open, text, told in ((False, "", []), (True, "", [""]), (False, "one", ["one"]), (False, "two", [" two"])):
        session.is_open = is_open or session.is_open        # an empty segment takes back the words of the first pass
        session.recognise_piece = lambda *_: report.Result(text, 0.0, [], [report.Word(text, 0, 1, 1)] * bool(text))
        found = list(session.tell_piece(streams.Piece(0.0, 1.0, None)))
        assert ([message["text"] for message in found], session.is_open, session.parts) == (told, False, [])
    assert found[-1]["text_so_far"] == "one two"

def test_an_answer_over_a_socket_has_its_times_in_ms_and_is_counted_in_seconds(monkeypatch):
    """Words that come again with a second pass are not counted."""
    session, seen, sent = object.__new__(sessions.Session), [], []
    session.settings, session.arrived = SimpleNamespace(wav_name="a"), 10.0
    monkeypatch.setattr(sessions, "time", SimpleNamespace(monotonic=lambda: 12.34567))
    answer = session.message("online", "b", "ab", [{}, {}], [SimpleNamespace(start=0.0016, end=0.0124)])
    assert answer == {"mode": "online", "wav_name": "a", "text": "b", "is_final": False, "timestamp": "[[2, 12]]",
                      "tokens": [{}, {}], "text_so_far": "ab", "latency_ms": 2345.7}
    metrics = SimpleNamespace(observe=lambda *given: seen.append(given),
                              add=lambda name, amount: seen.append((name, amount)))
    sessions.tell(SimpleNamespace(send_text=sent.append), [answer, {**answer, "mode": "2pass-online"}, {}], metrics)
    latency = ("asr_stream_latency_seconds", 2.3457)
    assert len(sent) == 3 and seen == [latency, ("asr_tokens_total", 2), latency]

def test_settings_may_come_in_any_message_and_count_from_the_next_utterance():  # C204
    models = socket_models("whole")
    defaults = settings.first_settings(models)
    assert (defaults.mode, defaults.audio_fs, defaults.chunk) == ("2pass", 16000, streaming.Chunk())
    hotwords = settings.Models(models.streaming, kit_system("contextual"))
    for given in ('{"我们": 20, "ab": 30}', "我们,ab", ["我们", "ab"]):
        assert settings.read_settings(defaults, {"hotwords": given}, hotwords)[0].hotwords == ("我们", "ab")
    parts = hotwords._replace(streaming=None), hotwords._replace(whole=None)
    assert [models.modes() for models in parts] == [("offline",), ("online",)]
    with serving(models, max_queue=0) as server, Talker(server) as client:      # a stream's segments find room
        client.send(pcm_of(kit_speech(1.0)))            # before any text: the defaults hold
        client.send({"mode": "online", "audio_fs": 8000, "wav_name": "now"})
        messages = client.say({}, pcm_of(kit_speech(2.0))[32000:])
        assert {m["mode"] for m in messages} <= {"2pass-online", "2pass-offline"} and messages[-1]["wav_name"] == "now"
        assert {m["mode"] for m in client.say({}, pcm_of(kit_speech(1.0)))} == {"online"}

def test_streams_that_are_heard_together_are_what_they_are_alone(monkeypatch):  # C205
    """Of all modes and several rates and chunks, due at different times; exactly, on one thread."""
    models = socket_models("whole")
    data = kit_speech()
    asked = [{"mode": "online"}, {"mode": "online", "chunk_size": [5, 8, 4]}, {"mode": "2pass"}, {"mode": "offline"},
             {"mode": "online", "audio_fs": 8000}, {"mode": "2pass", "audio_fs": 48000}]
    first = [streams.start_stream(models, settings.read_settings(settings.first_settings(models), given, models)[0])
             for given in asked]

    def run(together: bool) -> list[list]:
        found, states, places = [[] for _ in first], list(first), [0] * len(first)
        running = list(range(len(first)))
        while running:
            steps, rest = [], []
            for i in running:
                count = streams.samples_due(models, states[i])
                is_last = places[i] + count > len(data)
                piece = data[places[i]:] if is_last else data[places[i]:places[i] + count]
                places[i] += len(piece)
                steps.append(Step(piece, states[i], 0.0, 0.0, lambda: False, is_last=is_last))
                rest += [] if is_last else [i]
            heard = streams.hear_steps(models, steps) if together else []
            for step in [] if together else steps:
                heard += streams.hear_steps(models, [step])
            for i, (state, events) in zip(running, heard):
                states[i] = state
                found[i] += events
            running = rest
        return found

    due = streams.samples_due(models, first[0])
    (stream, _), = streams.hear_chunks(models, [first[0]._replace(pending=data[:due + 5])], [False])
    assert torch.equal(stream.pending, data[due:due + 5])
    ends = [Step(data[:0], state, 0.0, 0.0, list, is_last=True) for state in first]
    heard = streams.hear_steps(models, [*ends, Step(data, first[2], 0.0, 0.0, list)])       # in the last a segment ends
    assert [len(events) for _, events in heard] == [1, 1, 0, 0, 1, 0, 1]
    (_, heard), = streams.hear_chunks(models, [first[0]._replace(pending=data)], [True])
    (_, later), = streams.hear_chunks(models, [first[5]._replace(pending=data, begun=8000)], [True])    # a second pass
    with monkeypatch.context() as planted:      # of all, one word is certain before the end
        planted.setattr(streams, "certain_text", lambda tokenizer, state, text: "certain")
        new = [streams.hear_chunks(models, [first[0]._replace(pending=data)], [end])[0][1].new for end in (True, False)]
    assert new == [heard.text, "certain"]
    assert heard.tokens and later.tokens == decode.shifted(heard.tokens, 0.5)      # samples at the model's rate
    for together, alone in zip(run(True), run(False), strict=True):
        assert len(together) == len(alone) > 0
        for one, other in zip(together, alone):
            assert type(one) is type(other)
            for x, y in zip(one, other):
                assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y

def test_what_is_shown_of_a_text_is_never_taken_back():  # C200
    """Random symbols, among them letters, which become capitals when a second one follows. Oracle: the text of all."""
    rng = random.Random(0)
    symbols = ["a", "b", "i", "he@@", "b@@", "llo", "我", "7", "ok", "%", "c", "<unk>", "不"]
    tokenizer = PieceTokenizer(("<blank>", "<s>", "</s>", "<unk>"), None)
    state = streaming.State(*[None] * (len(streaming.State._fields) - 2), "", ())
    for _ in range(300):
        heard, shown, now = [], "", state
        for _ in range(rng.randint(1, 8)):
            new = rng.choices(symbols, k=rng.randint(0, 3))
            heard += new
            now, text = streaming.write_on(tokenizer, now, new)
            certain = streaming.certain_text(tokenizer, now, text)
            assert certain.startswith(shown) and not certain.endswith(" "), (heard, shown, certain)
            shown = certain
        assert text.startswith(shown) and len(text) - len(shown) < 12 and text == write_sentence(spell_words(heard))
    for heard, certain in (("我", "我"), ("ok", "ok"), ("7", "7"), ("he@@ llo", "hello"), ("a b", ""), ("ok a", "ok")):
        assert streams.certain_text(tokenizer, *streaming.write_on(tokenizer, state, heard.split())) == certain

def test_sigterm_gives_streams_what_is_recognised_so_far_and_closes_them_with_1001():  # C206
    samples = kit_speech(3.0)
    wanted = stream_through(kit_system("streaming"), streaming.Chunk(), [samples])[0][0].text
    with serving(socket_models()) as server, Talker(server) as client, Talker(server) as silent:
        client.send(pcm_of(samples))
        messages = [client.read() for _ in range(4)]
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            draining = pool.submit(serve.drain, server, PATIENCE)
            messages += client.until_final()
            assert "".join(m["text"] for m in messages) == wanted
            assert client.closed() == 1001 == silent.closed()
            draining.result(PATIENCE)

def test_who_is_silent_is_pinged_and_closed_and_who_answers_stays(monkeypatch):  # C206
    """The limits of the server, of which 0.3 s are left for one half frame and for silence."""
    given, init = set(), sockets.Socket.__init__

    def hurried(self, connection, most, idle_sec, frame_sec):
        given.add((idle_sec, frame_sec))
        init(self, connection, most, 0.3, 0.3)

    monkeypatch.setattr(sockets.Socket, "__init__", hurried)
    with serving(socket_models(), idle_timeout=2 * PATIENCE, body_timeout=3 * PATIENCE) as server:
        with Talker(server) as gone, connected(server) as stuck:
            stuck.sendall(get("GET / HTTP/1.1", *ASKS) + client_frame(2, bytes(1000))[:500])        # half a frame
            assert gone.frame() == (9, b"") and gone.closed() == 1001
            assert struct.pack(">H", 1001) in b"".join(iter(functools.partial(stuck.recv, 4096), b""))
        wait_until(lambda: sum("code=1001" in line for line in server.lines) == 2)
    assert given == {(2 * PATIENCE, 3 * PATIENCE)}

def test_who_answers_pings_is_heard_whenever_he_speaks():
    """A connection that is played: nothing in time, then a pong, twice, and then a text."""
    sent, come = [], [None, client_frame(10), None, client_frame(10), client_frame(1, b"hello")]

    def read_some(deadline: float) -> bytes:
        if (piece := come.pop(0)) is None:
            raise TimeoutError
        return piece

    def take(size: int) -> bytes:
        piece = bytes(played.buffer[:size])
        del played.buffer[:size]
        return piece

    played = SimpleNamespace(buffer=bytearray(), read_some=read_some, take=take, write=sent.append)
    assert sockets.Socket(played, 99, 1.0, 1.0).read() == "hello" and sent == 2 * [sockets.to_frame(9, b"")]

def test_audio_that_comes_too_fast_is_held_back_by_not_reading_and_hurts_nobody(monkeypatch):  # C207
    """While nothing is heard, no more is taken in than a message and what the system keeps; then all of it is heard."""
    gate, heard = threading.Event(), []
    hear = serve.hear_steps

    def wait_and_hear(models, steps):
        gate.wait(PATIENCE)
        heard.append(sum(len(step.feats) for step in steps))
        return hear(models, steps)

    monkeypatch.setattr(serve, "hear_steps", wait_and_hear)
    rest = memoryview(client_frame(2, bytes(64000)) * 400)          # of two seconds each
    size = len(rest) // 400
    with serving(socket_models()) as server:
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)       # a connection has it from here
        with Talker(server) as client:
            client.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
            full = 0            # times in a row that nothing more was taken for a while
            while full < 4 and len(rest):
                full += 1
                if select.select([], [client.connection], [], 0.2)[1]:
                    rest, full = rest[client.connection.send(rest[:65536], socket.MSG_DONTWAIT):], 0
            assert len(rest) > 350 * size and exchange(server, get())[0] == 200
            gate.set()
            client.connection.sendall(rest[:len(rest) % size])          # the frame that has begun
            wait_until(lambda: sum(heard) > 16000 * 4)
            assert max(heard) <= 9600
    assert not [line for line in server.lines if "bug" in line]

def test_a_client_that_never_reads_is_ended_and_one_that_leaves_is_dropped():  # C207
    with serving(socket_models(), write_timeout=0.5) as server:
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)        # a connection has it from here
        with Talker(server) as client:
            client.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            with pytest.raises(ConnectionError):        # answers that nobody reads fill the buffers: the server ends it
                while True:
                    client.connection.sendall(client_frame(1, b"no json") * 1000)
            wait_until(lambda: any("code=1006" in line for line in server.lines))
        with Talker(server) as client:
            client.send(pcm_of(kit_speech()))
        wait_until(lambda: not server.phases)
        assert exchange(server, get())[0] == 200 and not [line for line in server.lines if "bug" in line]

@pytest.mark.parametrize("count", [12, pytest.param(300, marks=slow)])
def test_many_sockets_at_once_are_all_heard_and_those_above_the_limit_are_refused(monkeypatch, count):  # C207
    gate, hear, samples = threading.Event(), serve.hear_steps, kit_speech(1.5)
    monkeypatch.setattr(serve, "hear_steps", lambda *given: (gate.wait(PATIENCE), hear(*given))[1])
    wanted = stream_through(kit_system("streaming"), streaming.Chunk(), [samples])[0][0].text
    with serving(socket_models(), max_connections=count) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Talker(server)) for _ in range(count)]
        with Talker(server) as above:
            assert above.status == 503
        wait_until(lambda: f"\nasr_connections {count}\n" in serve.metrics_text(server))      # the one above has left
        wait_until(lambda: f"\nasr_sockets {count}\n" in serve.metrics_text(server))
        for client in clients:
            client.send({"mode": "online"})
            client.send(pcm_of(samples))
            client.send({"is_speaking": False})
        wait_until(lambda: len(server.batcher.steps) >= count // 2)
        gate.set()
        for client in clients:
            assert client.until_final()[-1]["text_so_far"] == wanted
    steps = re.search(r"asr_step_size_sum (\d+)\nasr_step_size_count (\d+)", serve.metrics_text(server))
    assert int(steps[1]) == 3 * count > int(steps[2])

def test_what_is_offered_is_said_and_requests_want_a_model_of_whole_utterances():  # C208
    with serving(socket_models()) as server:
        about = ask(server, get())
        assert (about["model"], about["modes"], about["sample_rate"]) == ("streaming", ["online"], 16000)
        found = exchange(server, post("/transcribe", "audio/wav", wav(NOISE)))
        assert check_error(*found) == (400, "streaming_checkpoint")
    with serving(socket_models("whole")) as server:
        assert ask(server, get())["modes"] == ["2pass", "online", "offline"]
        cards = ask(server, get("GET /v1/models HTTP/1.1"))["data"]
        assert [card["id"] for card in cards] == ["paraformer", "streaming"]
        assert ask(server, get("GET /v1/models/streaming HTTP/1.1"))["id"] == "streaming"
    with serving() as server, Talker(server) as client:         # 8 kHz, and no streaming model
        only, = client.say({"audio_fs": 8000}, NOISE.tobytes())
        assert ask(server, get())["modes"] == ["offline"]
        direct = ask(server, post("/transcribe", "audio/wav", wav(NOISE)))
        assert (only["mode"], only["text"]) == ("offline", direct["text"])
    with serving(serving_system(kind="toy")) as server:
        assert check_error(*exchange(server, get("GET /ws HTTP/1.1", *ASKS))) == (400, "toy_checkpoint")

@pytest.mark.parametrize("options, words", [
    (["streaming", "--vad", "vad"], "--vad: .* wants an --offline-checkpoint"),
    (["streaming", "--punctuate", "punc"], "--punctuate: .* wants an --offline-checkpoint"),
    (["streaming", "--offline-checkpoint", "streaming"], "got a streaming one"),
    (["streaming", "--chunk", "10,0"], "wanted 1 look-ahead frame or more"),
    (["sanm", "--offline-checkpoint", "sanm"],
     "--offline-checkpoint: wanted a streaming --checkpoint, got a paraformer"),
    (["sanm", "--chunk", "10,5"], "--chunk: wanted a streaming --checkpoint"),
    (["sanm", "--look-back", "4,1"], "--look-back: wanted a streaming --checkpoint"),
    (["streaming", "--offline-checkpoint", "8 kHz"], "--offline-checkpoint: wanted 16000 Hz as .* has, got 8000 Hz"),
    (["streaming", "--chunk", "8,4"], "")])
def test_checkpoints_that_do_not_go_together_are_refused(monkeypatch, options, words):  # C208
    load = serve.load_system
    monkeypatch.setattr(serve, "load_system", lambda folder, *given, **more: (
        serving_system() if folder == "8 kHz" else load(folder, *given, **more)))
    argv = ["--device", "cpu", "--checkpoint", *[str(kit(x)) if kit(x).is_dir() else x for x in options]]
    if words:
        refused(words, serve.load_warm, serve.parse_arguments(argv))
    else:
        assert serve.load_warm(serve.parse_arguments(argv)).streaming.chunk == streaming.Chunk(8, 4)

def test_the_websockets_package_is_understood():  # C200
    """As funasr_wss_client.py uses it: subprotocol binary, no pings, compression offered."""
    client = pytest.importorskip("websockets.sync.client", reason="the websockets package is not installed")
    samples = kit_speech(2.0)
    with serving(socket_models()) as server:
        host, port = server.server_address[:2]
        with client.connect(f"ws://{host}:{port}", subprotocols=["binary"], ping_interval=None) as connection:
            assert connection.subprotocol == "binary"
            connection.send(json.dumps({"mode": "online", "chunk_size": [5, 10, 5], "is_speaking": True}))
            for start in range(0, len(pcm_of(samples)), 1920):
                connection.send(pcm_of(samples)[start:start + 1920])
            connection.send(json.dumps({"is_speaking": False, "is_end": True}))
            text = ""
            while not (message := json.loads(connection.recv(timeout=PATIENCE))).get("is_end"):
                text += message["text"]
        assert text == stream_through(kit_system("streaming"), streaming.Chunk(old=5), [samples])[0][0].text
        wait_until(lambda: any("code=1000" in line for line in server.lines))

# ---- bench: figures ----

def test_the_benchmark_prints_every_figure_that_is_asked_for(tmp_path, capsys, monkeypatch):  # C112
    """With planted times, as three processes that import torch would take longer than the rest."""
    commands, trained, spans = [], bench.fit, iter([0.125, 0.125, 0.25])

    def turns(count: int, calls: dict) -> dict:
        assert count == 8
        for call in calls.values():
            call()
        return {name: [9.0, 4.0 if name[0] == "ours" else 5.0, 9.0][:count] for name in calls}

    def fit(run, progress):
        first, second = trained(run, progress).history
        assert run.config.training.seed == 5
        return SimpleNamespace(history=[{**first, "seconds": 10.0}, {**second, "seconds": 14.0, "data_wait": 0.25}])

    monkeypatch.setattr(bench, "time_turns", turns)
    monkeypatch.setattr(bench, "fit", fit)
    monkeypatch.setattr(bench, "first_step_sec", lambda options, folder: 7.0)
    monkeypatch.setattr(bench, "timeit", lambda work, number: (work(), number * next(spans))[1])
    monkeypatch.setattr(subprocess, "run", commands.append)
    assert bench.main(["train", tiny_yaml(tmp_path / "tiny.yaml"), "--training.seed=5"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    rows = [re.match(r"(.*?)\s+([\d.]+) ?(x|%|s)\s+[<>][= ]+([\d.]+)", line).groups() for line in lines]
    assert head.split() == ["figure", "measured", "asked"]
    asked = [("x", "1.0"), ("%", "5"), ("%", "2"), ("s", "3")]
    assert [(unit, wanted) for _, _, unit, wanted in rows] == asked
    assert rows[0][:2] == ("steps a second, ours 250.0, plain with as many parameters 200.0", "1.25")
    assert rows[1][:2] == ("data wait, second epoch, data.num_workers=0", "25.0")
    assert rows[2][:2] == ("checkpoints, 0.12 s of an epoch of 4.0 s", "3.1")
    assert rows[3][:2] == ("first step after 7.0 s, of which import torch 0.1 s", "6.9")
    assert commands == 2 * [[sys.executable, "-c", "import torch"]]
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]

def test_a_benchmark_has_the_median_times_errors_and_boundaries_of_each_search(tmp_path, capsys, monkeypatch):  # C110
    """Planted: all is right, but a transformer leaves out the last token, and boundaries are 3 frames late. The clock
    moves by what a search costs, and jumps in every third run."""
    systems = [searching_system(name, "toy", toy=NINE_TOYS) for name in ("paraformer", "transformer")]
    clock, calls = [0.0], collections.Counter()
    costs = {("paraformer", 1): 1.0, ("transformer", 1): 4.0, ("transformer", 10): 12.0}
    dataset = data.open_dataset(systems[0].config.data, "test", systems[0].tokenizer.encode, 0, systems[0].stats)
    known = {item.feats.sum().item(): item for item in map(dataset.__getitem__, range(9))}

    def planted(system, feats):
        name = system.config.model.name, system.search.width
        calls[name] += 1
        clock[0] += costs[name] if calls[name] % 3 else 99.0
        items, lost = [known[x.sum().item()] for x in feats], int(name[0] == "transformer")
        tokens = [item.tokens[:len(item.tokens) - lost] for item in items]
        padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        edges = [item.boundaries[:len(item.boundaries) - lost] + 3 for item in items]
        return Hypotheses(padded, ints(*map(len, tokens)), torch.zeros(padded.shape), edges, torch.zeros(9, 4), [])

    assert len(known) == 9
    monkeypatch.setattr(bench, "decode_batch", planted)
    monkeypatch.setattr(bench_long, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    paths = [saved(system, tmp_path / f"{i}.pt") for i, system in enumerate(systems)]
    assert bench.main(["decode", *paths, "--batch-size=1", "--batch-seconds=1e6", "--device=cpu"]) == 0
    head, _, *rows = capsys.readouterr().out.splitlines()
    n = sum(len(item.tokens) for item in known.values())
    assert head.startswith(f"9 utterances of {n / 9:.2f} tokens, batches of 1, cpu, ")
    right, wrong = ["0.00%", "0.00%", f"{n / 9:.2f}", "1.50"], ["100.00%", f"{900 / n:.2f}%", f"{n / 9 - 1:.2f}", "-"]
    assert [row.split(maxsplit=6) for row in rows] == [
        ["1.0", "1.00", *right, f"{paths[0]}, greedy"],
        ["0.2", "4.00", *wrong, f"{paths[1]}, greedy"], ["0.1", "12.00", *wrong, f"{paths[1]}, beam 10"]]

def test_a_benchmark_takes_other_inputs_as_its_data_and_the_search_that_is_asked_for(tmp_path, capsys):  # C110
    ckpt, wav = saved(searching_system("ctc"), tmp_path / "tiny.pt"), spoken(tmp_path / "a.wav", 0.7)
    said = {"audio": wav, "text": "ab c"}
    manifest = write_manifest(tmp_path / "m.jsonl", [{"audio": wav}, said, {"audio": wav, "text": "beyond"}])
    assert bench.main(["decode", ckpt, str(manifest), "--nbest=3", "--limit=2"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("1 utterances of 4.00 tokens, ") and out[3].endswith("tiny.pt, beam 3") and len(out) == 4
    longer = [str(manifest), "--min-segment-sec=0.1", "--max-segment-sec=0.6"]  # than that: they are cut
    for what in ([ckpt, wav], ["--ckpt", ckpt, *longer]):
        error = refusal(capsys, "decode", *what, script=bench)
        assert "wanted utterances with frames and a text, got none" in error

@pytest.mark.parametrize("arguments", [
    ["decode", "--plot=x"], ["decode", "--report=x"], ["decode", "--dtype=int8"], ["decode", "--ckpt=x"],
    ["decode", "--beam=2"], ["decode", "--batch-size=1"], ["decode", "x.pt", "--ckpt=y"],
    ["decode", "x.pt", "y.wav", "--ckpt=y"], ["decode", "x.pt", "--output=y"], ["train"]])
def test_measuring_refuses_what_has_no_effect_on_it(arguments, capsys):
    assert re.search("wanted (none|a config)", refusal(capsys, *arguments, script=bench))

@pytest.mark.parametrize("arguments, wanted", [
    (["x.pt", "--dtype=int8"], ("x.pt", "int8")), (["--dtype=int8", "--checkpoint=x.pt"], ("x.pt", "int8")),
    ([], (serve.DEFAULT_CHECKPOINT, "float32"))])
def test_the_checkpoint_that_is_named_is_served_and_measured(monkeypatch, arguments, wanted):
    measured = []
    monkeypatch.setattr(bench, "serving_figures", lambda options: measured.append(options) or [])
    assert bench.main(["serve", *arguments]) == 0
    assert (measured[0].checkpoint, measured[0].dtype) == wanted

@slow
def test_the_benchmark_of_a_server_prints_every_figure_that_is_asked_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "ROUNDS", 1)
    monkeypatch.setattr(bench, "import_sec", lambda: 0.0)       # a difference of two clocks may be none
    assert bench.main(["serve", saved(tiny_system("toy"), tmp_path / "tiny.pt"), "--threads=1"]) == 0
    rows = [re.search(r"([\d.]+) (s|ms|x) +([<>]= [\d.]+ (?:s|ms|x))$", line).groups()
            for line in capsys.readouterr().out.splitlines()[1:]]
    assert [asked for _, _, asked in rows] == ["<= 1 s", "<= 5 ms", ">= 1.3 x", ">= 2.0 x", "<= 3 x", "<= 50 ms"]
    assert all(float(measured) > 0 and asked.endswith(f" {unit}") for measured, unit, asked in rows)

def test_figures_of_a_server_are_medians_ratios_and_the_slowest_of_a_hundred(monkeypatch):
    """Planted: the clock moves a quarter of a second whenever it is read; what calls and two processes take."""
    clock = itertools.count(0, 0.25)
    pauses, asked = [], []
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: next(clock), sleep=pauses.append))
    answer = SimpleNamespace(status=200, read=lambda: b'{"a": 1}')
    connection = SimpleNamespace(request=lambda *given: asked.append(given[:3]), getresponse=lambda: answer,
                                 close=lambda: None)
    monkeypatch.setattr(http.client, "HTTPConnection", lambda host, port: connection)
    assert bench.ask_all(7, "/", [None, b"x"], 0.02) == [(250.0, {"a": 1})] * 2
    assert asked == [("GET", "/", None), ("POST", "/", b"x")] and pauses == [0.02] * 2
    monkeypatch.setattr(bench, "ask_all", lambda port, path, bodies: [(port, body) for body in bodies])
    bench.ask_at_once(7, range(8), 3, found := [])
    assert found == [(7, i) for i in (0, 3, 6, 1, 4, 7, 2, 5)]
    timed = [(ms, {"timing": {"infer_ms": infer_ms}}) for ms, infer_ms in ((9.0, 8.0), (60.0, 10.0), (12.0, 10.0))]
    replies = iter([timed[:1], [(ms, {}) for ms in range(1, 101)], timed, timed])
    turns = {"full batch": [100.0, 40.0, 9999.0], ("mixed", 1): [160.0, 16.0, 1600.0],
             ("mixed", 16): [64.0, 1.0, 100.0], ("equal", 1): [30.0], ("equal", 16): [10.0]}
    cold = (9e9, {"timing": {"infer_ms": 0.0}})     # of the turn that warms up
    monkeypatch.setattr(bench, "ask_at_once", lambda port, bodies, clients, found: found.extend(
        [cold] * len(bodies) + next(replies, [])))
    monkeypatch.setattr(bench, "time_turns", lambda rounds, calls: [call() for call in calls.values()] and turns)
    monkeypatch.setattr(bench, "recognise_batch", lambda system, feats: None)
    monkeypatch.setattr(bench, "load_warm", lambda options: SimpleNamespace(whole=tiny_system("toy")))
    monkeypatch.setattr(bench, "running", lambda options: contextlib.nullcontext((7, 5.0)))
    monkeypatch.setattr(bench, "import_sec", lambda: 3.5)
    monkeypatch.setattr(bench, "ask_all", lambda port, path, bodies, *pause: [(ms, {}) for ms in (1.0, 9.0, 3.0)])
    _, *lines = bench.serving_figures(SimpleNamespace(max_batch_size=2))
    rows = [line.rsplit(maxsplit=5)[-5:] for line in lines]
    assert lines[2].startswith("16 clients, mixed lengths, 2500.0 /s, one 1000.0 /s ")
    assert [" ".join(row[:2]) for row in rows] == ["1.50 s", "2.00 ms", "2.50 x", "3.00 x", "1.00 x", "9.0 ms"]

def shrink_benchmark(monkeypatch) -> None:
    """configs/paraformer_large.yaml becomes small."""
    options = rules.load(str(HERE / "configs/paraformer_large.yaml"))
    small = {"num_layers": 2, "hidden_dim": 64, "ffn_dim": 64}
    sizes = replace(options.model, encoder=replace(options.model.encoder, **small),
                    decoder=replace(options.model.decoder, **small))
    monkeypatch.setattr(rules, "load", lambda path: replace(options, model=sizes))

def test_the_benchmark_has_the_threads_that_are_asked_for(monkeypatch, capsys):  # C110
    """Planted are torch's own choice, 3 threads, and a model that takes no time."""
    commands = []
    shrink_benchmark(monkeypatch)
    monkeypatch.setattr(subprocess, "run", lambda command, cwd: commands.append(command)
                        or SimpleNamespace(returncode=0))
    monkeypatch.setattr(bench, "LOADS", ())
    monkeypatch.setattr(bench, "measure_peers", lambda folder, threads, layouts, python: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch, "set_num_threads", None)  # nobody asks for a number
    assert bench.main(["decode"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("1 M parameters, 3 threads\n") and {command[4] for command in commands} == {"3"}

def test_a_load_is_shown_with_its_shares_of_real_time_and_of_the_products(monkeypatch, capsys):
    """Planted: milliseconds. 100 ms of all parts are 2.5% of two utterances of 2 s; 40 ms of products, 50% of 80 ms."""
    layers = {"a": nn.Linear(3, 5), "key_value": nn.Linear(3, 5)}
    net, rows = nn.ModuleDict({"encoder": nn.Linear(3, 5), "decoder": nn.ModuleDict(layers), "x": nn.Linear(3, 5)}), []
    for layer in (net["encoder"], *net["decoder"].values(), net["x"]):
        layer.register_forward_hook(lambda layer, given, out: rows.append(out.shape[1]))
    run, gflop = bench.products(net, 10, 4)
    run()
    assert rows == [10, 4, 10] and gflop == pytest.approx(2e-9 * 15 * 24)
    shrink_benchmark(monkeypatch)
    system = bench.large_system(rules.load(""))
    systems = {("float32", "mapped"): system, ("float32", "laid out"): system}
    ms = {"front end": 8.0, "text": 12.0, "products mapped": 40.0, "products laid out": 50.0,
          ("float32", "mapped"): 80.0, ("float32", "laid out"): 160.0}
    monkeypatch.setattr(bench, "time_turns", lambda turns, calls: {name: [ms[name], 999.0, 1.0] for name in calls})
    monkeypatch.setattr(bench, "products", lambda model, frames, tokens: rows.append(frames) or (rows, 2.0))
    bench.time_load(systems, 2, 2)
    assert rows[3:] == [66, 66]     # of 60 ms
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split("products of ")[1] == "2 GFLOP: 50 GFLOP/s mapped, 40 laid out; limit 40 ms"
    assert [line.split()[5:] for line in lines] == [["8.0", "80", "(1", "to", "999)", "12.0", "2.50%", "50%"],
                                                    ["out", "8.0", "160", "(1", "to", "999)", "12.0", "4.50%", "25%"]]

@slow
def test_the_benchmark_prints_loading_and_every_load_in_every_layout(monkeypatch, capfd):
    shrink_benchmark(monkeypatch)
    monkeypatch.setattr(bench, "LOADS", ((1, 2), (2, 2)))
    monkeypatch.setattr(bench, "TIMINGS", 2)
    assert bench.main(["decode", "--threads=1"]) == 0
    text = capfd.readouterr().out
    layouts = [" +".join(layout) for layout in bench.LAYOUTS if checkpoint.runs_on(layout[0], torch.device("cpu"))]
    for layout in layouts:
        assert re.search(rf"^{layout}( +\d+\.\d\d){{2}}( +\d+){{2}}$", text, re.M)
        for load in (" +1 +2 s", " +2 +2 s"):
            assert re.search(rf"^{load} +{layout} +\d+\.\d +\d+ \(\d+ to \d+\) +\d+\.\d +\d+\.\d\d% +\d+%$", text, re.M)

PLANTED_FUNASR = """
from types import SimpleNamespace
import torch

class AutoModel:
    def __init__(self, model, **options):
        print("{ funasr says hello")
        self.folder = model
        self.model = self
    def eval(self):
        return self
    def export(self, type, quantize):
        assert torch.onnx.export.keywords == {"dynamo": False} and (type, quantize) == ("onnx", True)
        for name in ("model.onnx", "model_quant.onnx"):
            open(f"{self.folder}/{name}", "w").close()
    def encode(self, feats, lens):
        return feats, lens
    def calc_predictor(self, hidden, lens):
        return hidden, lens.float() / 10, None, None
    def cal_decoder_with_predictor(self, hidden, lens, embeds, counts):
        return hidden, lens
"""
PLANTED_ONNXRUNTIME = """
import os
SessionOptions = type("SessionOptions", (), {})

class InferenceSession:
    def __init__(self, path, options, providers):
        assert os.path.exists(path) and options.intra_op_num_threads == 1
    def run(self, wanted, given):
        assert given["speech_lengths"].dtype == "int32"
        return given["speech"], given["speech_lengths"] // 5
"""

@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
@pytest.mark.parametrize("peers", [pytest.param(True, marks=slow), False])
def test_ours_is_measured_beside_the_peers_that_are_installed(tmp_path, monkeypatch, capfd, peers):
    """Planted: peers that find a token per 5 or 10 frames of 2 s, and a machine of which every third turn is lost."""
    (tmp_path / "packages").mkdir()
    names = {"funasr": PLANTED_FUNASR, "onnxruntime": PLANTED_ONNXRUNTIME, "onnx": ""} if peers else {}
    for name, text in names.items():
        (tmp_path / f"packages/{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.setattr(bench_peers, "CASES", ((2, 2, 1),))
    monkeypatch.setattr(bench_peers, "TURNS", 2)
    turns = itertools.count()
    monkeypatch.setattr(bench_peers, "is_disturbed", lambda busy, own, wall: next(turns) % 3 == 0)
    folder = kit_copy("sanm", tmp_path / "model")
    bench_peers.measure_peers(str(folder), 1, [("float32", "mapped")], sys.executable)
    out = capfd.readouterr().out
    figures = r" +\d+ \(\d+ to \d+\) +{} +{} +\d+ +\d+\.\d$"
    assert re.search(f"^ours float32 mapped{figures.format('[0-9.]+' if peers else '-', '[0-9]+')}", out, re.M)
    assert f"\n2 of 2 s; {4 if peers else 1} turns beside other work discarded\n" in out
    missing = f"{sys.executable} has no funasr, onnx, onnxruntime (--peer-python names another): measured are ours\n"
    assert (missing in out) == (not peers)
    for name, tokens in (("onnxruntime float32", 12), ("onnxruntime int8", 12), ("FunASR float32", 6)):
        ratio = "1.00" if name.startswith("onnx") else "[0-9.]+"
        assert bool(re.search(f"^{name}{figures.format(ratio, tokens)}", out, re.M)) == peers
    assert len(out.splitlines()) == (9 if peers else 8)

@pytest.mark.parametrize("busy, own, wall, disturbed", [(1.0, 1.0, 1.0, False), (1.99, 1.9, 1.0, False),
                                                        (2.0, 1.8, 1.0, True), (0.0, 1.5, 1.0, False),
                                                        (4.0, 3.85, 2.0, False)])
def test_a_turn_is_disturbed_if_others_use_a_twentieth_of_two_cores(monkeypatch, busy, own, wall, disturbed):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert bench_peers.is_disturbed(busy, own, wall) == disturbed

def test_a_case_of_peers_is_medians_and_their_ratio_to_onnxruntimes(tmp_path, monkeypatch, capsys):
    names = "onnxruntime int8", "ours int8", "onnxruntime float32"
    found = (100.0, 90.0, 170.0), (200.0, 1500.0, 100.0), ()
    workers = [bench_peers.Worker(bench_peers.Contestant(*name.split(), "-", ""), None, 2.5) for name in names]
    kept = [[{"ms": ms, "tokens": 5, "peak_mb": 100.4} for ms in row] for row in found]
    monkeypatch.setattr(bench_peers, "take_turns", lambda workers, path, calls: (kept, np.load(path).shape))
    bench_peers.measure_case(workers, str(tmp_path), 2, 3, 1)
    assert [line.split(maxsplit=3)[-1].split() for line in capsys.readouterr().out.splitlines()] == [
        "s; (2, 50, 560) turns beside other work discarded".split(), "100 (90 to 170) 1.00 5 100 2.5".split(),
        "200 (100 to 1500) 2.00 5 100 2.5".split(), "the machine was never quiet".split()]
    monkeypatch.setattr(bench_peers, "Path", lambda name: tmp_path / "stat")
    assert bench_peers.busy_sec() == 0.0
    (tmp_path / "stat").write_text("cpu  100 20 300 9000 9000 40 50 60 9000 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    assert bench_peers.busy_sec() == 570 / os.sysconf("SC_CLK_TCK")

def test_a_peer_interpreter_that_is_none_or_has_no_effect_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="--peer-python: wanted a Python interpreter, got nowhere"):
        bench_peers.measure_peers(str(tmp_path), 1, [], "nowhere")
    error = refusal(capsys, "decode", "a.pt", "--peer-python=x", script=bench)
    assert "--peer-python: wanted no INPUT beside it" in error

@slow
def test_the_benchmark_prints_what_each_length_of_a_list_costs(monkeypatch, capfd):
    shrink_benchmark(monkeypatch)
    monkeypatch.setattr(bench, "TIMINGS", 2)
    monkeypatch.setattr(bench, "LISTS", (0, 3))
    assert bench.main(["hotwords"]) == 0
    text = capfd.readouterr().out
    for count in (0, 3):
        assert re.search(rf"^Fresh .* {count} hot.*\n.*\nfloat32 +mapped( +\d+\.\d\d){{2}}( +\d+){{2}}$", text, re.M)
        assert re.search(rf"^ +{count} float32 +\d+ \(\d+ to \d+\) +\d+\.\d$", text, re.M)

def test_amounts_trains_on_the_first_utterances_and_prints_what_decoding_finds(tmp_path, capsys, monkeypatch):
    """Oracle: decode.py on the checkpoint that the run left, and the rows that it was trained on."""
    rows = [{"audio": spoken(tmp_path / f"a{i}.wav", 0.8), "text": "ab ba"[:i % 3 + 1]} for i in range(12)]
    for name in ("train", "dev", "test", "other"):
        write_manifest(tmp_path / f"{name}.jsonl", rows)
    path = tiny_yaml(tmp_path / "tiny.yaml")
    argv = ["amounts", str(tmp_path), "--sizes", "3", "12", "--config", path, "--runs", str(tmp_path / "runs"),
            "--data.kind=manifest", "--training.num_epochs=2"]
    clock = itertools.count(1, 4)
    monkeypatch.setattr(amounts, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert bench.main(argv) == 0
    head, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")]
                       for line in capsys.readouterr().out.splitlines()]
    assert head == ["utterances", "epochs", "seconds", "WER on dev", "other", "test"]
    for size, line in zip((3, 12), lines, strict=True):
        assert line[:3] == [str(size), "2", "4"]
        run = run_of(tmp_path / "runs" / str(size))
        assert read_checkpoint(run / "checkpoints/best.pt")["utterances"] == size
        _, _, error = decoded(capsys, "--ckpt", run / "checkpoints/best.pt", tmp_path / "test.jsonl")
        assert line[3] == line[4] == line[5] == re.search(r"%WER (\S+)", error)[1] + "%"
    assert bench.main([*argv[:3], "20", *argv[5:]]) == 2
    assert "train.jsonl: wanted 20 utterances, got 12" in capsys.readouterr().err
    assert [amounts.epochs_for(size) for size in (64, 250, 1000, 3000)] == [200, 120, 30, 20]
    assert [amounts.epochs_for(size, 0.33) for size in (64, 250, 1000, 3000)] == [66, 40, 10, 7]
    assert amounts.epochs_for(3000, 0.01) == 1
    assert bench.main([*argv, "--training.batch_sise=3"]) == 2
    assert "training on 3 utterances ended with exit code 2" in capsys.readouterr().err
    given = []
    monkeypatch.setattr(amounts, "measure", lambda size, options, *rest: given.append((size, options.epochs_share)))
    assert bench.main(["amounts", str(tmp_path)]) == 0
    assert given == [(64, 1.0), (250, 1.0), (1000, 1.0), (3000, 1.0)]

def test_parts_are_timed_at_their_published_sizes(capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    clock, busy = iter([9.0, 0.0, 5.0, 5.0, 8.0]), iter([1.0, 4.0])
    with monkeypatch.context() as planted:
        planted.setattr(bench_long, "time", SimpleNamespace(perf_counter=clock.__next__, process_time=busy.__next__))
        assert bench_long.best_of(2, lambda: None) == (3.0, 1.0)
    monkeypatch.setattr(bench_long, "best_of", lambda turns, call: (call(), (1.8, 2.0))[1])
    bench_long.measure_parts([], 60, 100, 1)
    assert seen == [2]
    assert capsys.readouterr().out.splitlines() == [
        "VAD: 60 s of audio in 1.80 s, 3.000% of real time; busy for 2.00 s",
        "punctuation: 100 characters in 1.80 s; busy for 2.00 s"]
    listener = vad.Fsmn(vad.Network())
    assert len(listener.state_dict()) == 24 and sum(x.numel() for x in listener.state_dict().values()) == 428738
    assert bench.main(["parts", "more"]) == 2

def test_cuts_counts_those_inside_utterances_and_the_errors_they_make(tmp_path, capsys, monkeypatch):
    """Planted: every recording is heard as 'a', a joined one as an 'a' a segment. One has another text, one a pause."""
    rows, noises = [], []
    for i in range(7):      # of which 6 are asked for
        samples = 0.2 * np.random.default_rng(i).standard_normal(24000)
        samples[8000:16000] *= i != 3
        audio.save_wav(tmp_path / f"{i}.wav", samples, 8000)
        rows.append(json.dumps({"audio": f"{i}.wav", "text": "a" if i else "b"}))
    monkeypatch.setattr(bench_long, "save_wav", lambda path, samples, rate_hz:
                        noises.append(samples[-800:].std().item()) or audio.save_wav(path, samples, rate_hz))
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    heard = report.Result("a", 1.0, [report.Token("a", 5, 1.0, 0.0, 1.0)], [report.Word("a", 0.0, 1.0, 1.0)])
    monkeypatch.setattr(bench_long, "transcribe", lambda system, feats: [heard])
    monkeypatch.setattr(bench_long, "transcribe_segments",
                        lambda system, pieces: [(x.start_sec, heard) for x in pieces])
    ckpt = saved(tiny_system(), tmp_path / "tiny.pt")
    assert bench.main(["cuts", "--ckpt", ckpt, "--device", "cpu", "--limit=6", str(tmp_path / "a.jsonl")]) == 0
    lines = capsys.readouterr().out.splitlines()
    whole = "6 cuts, 1 inside one of 6 utterances; WER alone 16.67%, joined 33.33% of 6 words"
    assert noises == pytest.approx([0.0, 10 ** -3.0, 10 ** -2.25, 10 ** -1.5, 0.0], rel=0.05, abs=1e-6)     # dB
    assert [line.partition(":")[0] for line in lines[1:4]] == [f"noise at {-db} dBFS" for db in (60, 45, 30)]
    assert len(lines) == 5 and lines[0] == f"silent pauses: {whole}" and lines[4] == f"an offset of 0.1: {whole}"
    assert bench.main(["cuts", "--ckpt", ckpt]) == 2

def test_the_time_of_chunks_is_that_of_the_most_streams_below_their_length(monkeypatch):  # C212
    """Planted: a batch takes 60 ms and 45 ms a stream. 600 ms hold five single streams, not quite twelve in a batch.
    Before that, a clock that moves a quarter of a second whenever it is read."""
    system, clock, heard = kit_system("streaming"), itertools.count(0, 0.25), []
    with monkeypatch.context() as planted:
        planted.setattr(bench_long, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
        planted.setattr(bench_stream, "feed_many", lambda system, states, pieces, last: heard.append(pieces))
        assert bench_stream.step_ms(system, [None] * 2) == 250.0 and len(heard) == 10
        assert [len(piece) for piece in heard[0]] == [9600, 9600]
    monkeypatch.setattr(bench_stream, "step_ms", lambda system, states: 60 + 45 * len(states))
    assert [len(speech) for speech in bench_stream.speeches(system, [], 2, 1.5)] == [48000, 48000]      # 16 bits
    lines = list(bench_stream.chunk_figures(system))
    assert "real-time factor 0.175" in lines[0] and "alone, one after another, 5 streams" in lines[0]
    assert [line.split()[3] for line in lines[1:-2]] == ["2", "4", "6", "8", "12"]
    assert lines[1].endswith(" 150.0 ms, 75.0 a stream")
    assert lines[-2] == "in one batch, 8 streams stay in real time"
    assert lines[-1].endswith("greatest difference: 0 (0: equal to the last bit)")

def test_latency_is_from_the_sample_that_completes_a_chunk_to_its_message():  # C212
    """A chunk of 600 ms decides the tokens up to 300 ms before its end: one that ends at 0.25 s is of the first, one at
    0.35 s of the second, one within a ms of 0.3 s of either; one at 1.9 s is completed by the end of the stream, and
    one without tokens is none. Planted."""
    said = [(0.7, 0.25), (1.5, 0.35), (1.55, 0.302), (1.6, 0.3), (1.6, 0.3005), (1.7, 1.9), (2.0, None)]
    messages = [(now, {"is_final": end is None, "tokens": [{"end": end}]}) for now, end in said]
    heard = bench_stream.Talk(0.0, [(160 * i, 0.01 * i) for i in range(1, 200)], messages)
    system = kit_system("streaming")
    messages.insert(0, (0.1, {"is_final": False, "tokens": []}))
    assert bench_stream.latencies_ms(heard, system) == pytest.approx([100, 300, 350])
    messages.append((3.0, {"error": {"message": "no"}}))
    refused("the server: no", bench_stream.latencies_ms, heard, system)

@pytest.mark.parametrize("options, threads, wanted", [([], 2, (["a.wav"], 50, 30.0)), (
    ["--sockets=3", "--seconds=1.5", "--threads=1"], 1, (["a.wav"], 3, 1.5))])
def test_stream_measures_as_many_sockets_for_as_long_as_it_is_told(monkeypatch, options, threads, wanted):  # C212
    seen = []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    monkeypatch.setattr(bench_stream, "chunk_figures", lambda system: [])
    monkeypatch.setattr(bench_stream, "running",
                        lambda given: seen.append(given.threads) or contextlib.nullcontext((7, 0.0)))
    monkeypatch.setattr(bench_stream, "socket_figure", lambda system, port, *given: seen.append(given))
    assert bench.main(["stream", str(kit("streaming")), "a.wav", *options]) == 0 and seen == [threads, threads, wanted]

def test_sockets_speak_at_real_time_pace_and_are_timed():  # C212
    system, began = kit_system("streaming"), time.monotonic()
    with serving(settings.Models(system, None)) as server:
        port, wav = server.server_address[1], str(kit("wavs/libri_dev.wav"))
        line = bench_stream.socket_figure(system, port, [wav], 2, 1.5)
    assert [bench_stream.to_frame(2, bytes(n))[:4] for n in (125, 126)] == [b"\x82\xfd\0\0", b"\x82\xfe\0\x7e"]
    found = re.match(r"2 sockets at real-time pace for 1.5 s: latency p50 (\d+) ms, p99 (\d+) ms .* "
                     r"of (\d+) messages", line)
    assert time.monotonic() - began > 1.5 and 0 < int(found[1]) <= int(found[2]) and 2 <= int(found[3]) <= 8
    assert bench.main(["stream", str(kit("sanm"))]) == 2

# ---- the project: layout, floors, documents ----

FLOORS = {"config": 1, "tokenizer": 1, "audio": 1, "attention": 1, "plot": 1, "web": 1, "sockets": 1, "downloads": 1,
          "monitor": 1, "pauses": 1, "ranks": 1, "survival": 1, "manifests": 1, "files": 1, "augment": 1,
          "bench_peers": 1, "commandline": 1, "rules": 2, "packed": 1, "data": 2, "live": 2, "pieces": 2,
          "funasr_layers": 2, "batcher": 2, "compare": 3, "model": 3, "corpora": 3, "funasr": 3,
          "baselines": 4, "hotwords": 4, "report": 4, "step": 4, "streaming": 4, "chunked": 4, "vad": 4,
          "punctuation": 4, "checkpoint": 5, "sentences": 5, "dry_run": 5, "outputs": 5, "pictures": 5,
          "openai_forms": 5, "train": 6, "decode_options": 6, "listen": 6, "amounts": 7, "decode": 7,
          "bodies": 8, "bench_long": 8, "transcribe": 9, "settings": 9, "streams": 10, "sessions": 11, "serve": 12,
          "bench_stream": 13, "bench": 14}
LEAVES = [name for name, floor in FLOORS.items() if floor == 1]
FILES = [name for name in FLOORS if (HERE / f"{name}.py").exists()]

def imported(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return {name.split(".")[0] for name in names + [n.module for n in nodes if isinstance(n, ast.ImportFrom)]}

@pytest.mark.parametrize("name", FILES)
def test_imports_go_down_the_floors_only(name):  # C35
    names = imported(HERE / f"{name}.py")
    assert all(FLOORS[other] < FLOORS[name] for other in names & set(FLOORS))
    assert names - set(FLOORS) <= {"torch", "numpy"} | set(sys.stdlib_module_names)

@pytest.mark.parametrize("name", FILES)
def test_masks_and_features_have_one_source(name):  # C2 C15
    """Nobody else calls what the front end is made of, or draws triangles for masks."""
    called = {ast.unparse(node.func).split(".")[-1] for node in ast.walk(ast.parse((HERE / f"{name}.py").read_text()))
              if isinstance(node, ast.Call)}
    assert name in ("audio", "live") or not called & {"fbank", "lfr", "mel_matrix"}
    assert name in ("audio", "live", "data", "corpora") or "resample" not in called
    assert name == "attention" or not called & {"tril", "triu"}

def moved_to(folder: Path) -> str:
    """Code for a Zygote's process: it works in a folder, and knows none of the project's files."""
    names = sorted(FLOORS)
    return f"os.chdir({str(folder)!r})\nfor name in {names}:\n    sys.modules.pop(name, None)\n"

def test_each_leaf_imports_alone_in_an_empty_folder(zygote, tmp_path):  # C35
    """Each in a folder of its own, and none when the next one is imported."""
    for name in LEAVES:
        (tmp_path / name).mkdir()
        shutil.copy(HERE / f"{name}.py", tmp_path / name)
    code = """import importlib
for name in order["argv"]:
    sys.path[0] = name
    importlib.import_module(name)
    del sys.modules[name]
sys.exit()"""
    assert zygote.run(tmp_path / "said", *LEAVES, first=moved_to(tmp_path) + code) == ""

def test_the_top_level_holds_what_the_layout_names_and_nothing_else():
    allowed = {f"{name}.py" for name in [*FLOORS, "test_all"]} | {
        "configs", "runs", "page.html", "README.md", "CONTRACTS.md", "LICENSE", "requirements.txt", ".gitignore", ".ci"}
    tracked = subprocess.run(["git", "ls-files"], cwd=HERE, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("no git checkout")
    assert {line.split("/")[0] for line in tracked.stdout.split("\n") if line} <= allowed

def test_readme_counts_the_lines_of_each_file():
    text = (HERE / "README.md").read_text()
    rows = re.findall(r"^\| [\d-]+ \| `(\w+\.py)` \| (\d+) \|", text, re.MULTILINE)
    rows += re.findall(r"`(\w+\.py)` \((\d+)\)", text)
    counts = {f"{name}.py": str((HERE / f"{name}.py").read_text().count("\n")) for name in [*FILES, "test_all"]}
    assert dict(rows) == counts and len(rows) == len(counts)

def test_every_contract_names_tests_that_exist_and_carry_its_id():
    found = re.findall(r"((?:^[#@ )\]].*\n)*^def (test_\w+)\(.*)", Path(__file__).read_text(), re.MULTILINE)
    heads = {name: lines for lines, name in found}
    clauses = re.findall(r"^\| (C\d+) \|.*\| ([^|]*) \|$", (HERE / "CONTRACTS.md").read_text(), re.MULTILINE)
    assert len({id for id, _ in clauses}) == len(clauses) > 30
    for id, tests in clauses:
        names = re.findall(r"`(test_\w+)`", tests)
        assert names, id
        for name in names:
            assert re.search(rf"# .*\b{id}\b", heads.get(name, "")), f"{id}: {name}"

def readme_code() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (HERE / "README.md").read_text(), re.MULTILINE | re.DOTALL)

def test_readmes_uses_of_copied_files_run_in_an_empty_folder(zygote, tmp_path):
    code, = [c for c in readme_code() if not c.startswith("# energy.py")]
    for name in set(FILES) & set(re.findall(r"^from (\w+)", code, re.MULTILINE)):
        shutil.copy(HERE / f"{name}.py", tmp_path)
    assert {path.stem for path in tmp_path.iterdir()} <= set(LEAVES)
    zygote.run(tmp_path / "said", first=f"{moved_to(tmp_path)}exec({code!r}, {{}})\nsys.exit()")

def test_readmes_new_architecture_is_trained_and_found_again_by_the_command_that_its_run_prints(zygote, tmp_path):
    code, = [c for c in readme_code() if c.startswith("# energy.py")]
    assert len(code.splitlines()) <= 30
    (tmp_path / "energy.py").write_text(code)
    argv = ["train.py", tiny_yaml(tmp_path / "tiny.yaml"), "--model.name=energy.EnergyParaformer"]
    for _ in range(2):
        script, there = argv[0].removesuffix(".py"), f"os.chdir({str(tmp_path)!r})"
        said = zygote.run(tmp_path / "said", *argv[1:], script=script, first=there)
        argv = (re.findall("decode with: python (.*)", said) or [""])[0].split()
    assert script == "decode" and "token accuracy" in said

def test_readmes_new_loss_is_in_the_total_and_in_all_that_a_run_leaves(zygote, tmp_path):
    """Its lines put below the ones that README shows, in a copy of the project. Oracle: the sum by hand."""
    change, = re.findall(r"^```diff\n(.*?)^```", (HERE / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(change.splitlines()) <= 15
    for path in HERE.glob("*.py"):
        shutil.copy(path, tmp_path)
    for name, lines in re.findall(r"^# (\S+)\n((?:[ +].*\n)+)", change, re.MULTILINE):
        above, *added = lines.splitlines(keepends=True)
        text = (tmp_path / name).read_text()
        assert text.count(f"\n{above[1:]}") == 1
        (tmp_path / name).write_text(text.replace(above[1:], above[1:] + "".join(line[1:] for line in added)))
    path = tiny_yaml(tmp_path / "tiny.yaml")
    argv = [path, "--model.z_weight=0.25", "--training.num_epochs=1", "--training.threads=1"]
    zygote.run(tmp_path / "said", *argv, first=moved_to(tmp_path) + "import train")
    run, options = run_of(tmp_path / "runs"), rules.load(path).model
    row, = history_of(run)
    for split in ("", "dev_"):
        ce, quantity, ctc, z = (row[f"{split}loss_{name}"] for name in ("ce", "quantity", "ctc", "z"))
        assert row[f"{split}loss"] == pytest.approx((1 - options.ctc_weight) * ce + options.quantity_weight * quantity +
                                                    options.ctc_weight * ctc + 0.25 * z) and z > 0
    assert {"loss_z", "dev_loss_z"} <= set((run / "results.csv").read_text().split("\n")[0].split(","))
    assert "  z " in (run / "train.log").read_text() and ">z " in (run / "curves.svg").read_text()

@pytest.mark.parametrize("name, words", [
    ("nowhere.Energy", "wanted nowhere.py in the working directory for nowhere.Energy, got none"),
    ("mine.Nothing", "wanted a torch.nn.Module of the name Nothing in mine.py, got None"),
    ("mine.path", "wanted a torch.nn.Module of the name path in mine.py, got <module"),
    ("energy", "model.name must be one of")])
def test_an_architecture_that_is_not_there_is_named(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("from os import path\n")
    refused(re.escape(words), checkpoint.architecture, name)

def readme_commands() -> list[str]:
    """The command lines of README, without the remarks behind them."""
    blocks = re.findall(r"(?:^    .*\n)+", re.sub(r"```.*?```", "", (HERE / "README.md").read_text(), flags=re.S), re.M)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [re.split(r"\s{3,}", line.strip())[0] for line in lines]

README_RUNS = {  # of configs as README names them: options that make a run of seconds
    "configs/toy.yaml": "--training.num_epochs=1 --data.toy.num_train=64 --data.toy.num_dev=12 --training.threads=1",
    "configs/finetune.yaml": "--training.num_epochs=1 --data.augment.freq_width=3 --training.threads=1",
    "configs/small.yaml": "--training.num_epochs=1 --data.num_workers=0",
    "configs/digits.yaml": "--training.num_epochs=1 --training.threads=1 --data.num_workers=0"}

def small(command: str) -> str:
    """A command of README that takes seconds; "" for what installs, tests, serves and measures, and for energy.py."""
    install = "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt && "
    command = command.removeprefix(install)
    others = ("python -m pytest", "pip ", "python bench.py", "curl ", "modelscope ", "hf ", "git ")
    if command.startswith(others) or "python serve.py" in command or "energy." in command:
        return ""
    for name, options in README_RUNS.items():
        command = command.replace(name, f"{name} {options}")
    return command.replace("--training.num_epochs=30", "--training.num_epochs=3").replace("_node=4", "_node=2")

@pytest.fixture(scope="module")
def readme_folder(tmp_path_factory) -> Path:
    """A copy of the project with the recordings and manifests that README's commands name, and a short run."""
    folder = tmp_path_factory.mktemp("readme")
    for path in [*HERE.glob("*.py"), HERE / "page.html"]:
        shutil.copy(path, folder)
    shutil.copytree(HERE / "configs", folder / "configs")
    rows = []
    for i, name in enumerate(["a", "b", "talk", *(f"my_recordings/r{i}" for i in range(30)), "recordings/c"]):
        (folder / name).parent.mkdir(exist_ok=True)
        spoken(folder / f"{name}.wav", 1.0 + 0.01 * i)
        (folder / f"{name}.txt").write_text("ab ba")
        rows.append({"audio": f"{name}.wav", "text": "ab ba", "duration": 1.0 + 0.01 * i})
    for name in ("train", "dev", "test"):
        write_manifest(folder / f"{name}.jsonl", rows[3:9])
    for variant, name in (("seaco", "paraformer-zh"), ("vad", "fsmn-vad"), ("punc", "ct-punc")):
        shutil.copytree(kit(variant), folder / name)
    shutil.copytree(kit("streaming"), folder / "paraformer-zh-streaming")
    return folder

@slow
def test_every_command_of_readme_runs_as_it_stands(readme_folder):
    """One after the other in one shell, as pasted, each once, with small runs for large ones."""
    commands = [command for command in dict.fromkeys(map(small, readme_commands())) if command]
    assert len(commands) > 20
    scripts = Path(sys.executable).parent
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive",
           "PATH": f"{scripts}:{os.environ['PATH']}"}
    script = "".join(f"{command}\ncode=$?; echo \"exit $code of {n}\"\n" for n, command in enumerate(commands))
    done = subprocess.run(["bash"], input=script, cwd=readme_folder, capture_output=True, text=True, env=env,
                          timeout=900)
    codes = dict(map(reversed, re.findall(r"^exit (\d+) of (\d+)$", done.stdout, re.MULTILINE)))
    for n, command in enumerate(commands):
        allowed = ("0", "1") if "--overfit" in command else ("0",)  # a few steps learn no made-up text by heart
        assert codes.get(str(n)) in allowed, (command, done.stderr[-3000:])

@slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not here")
def test_every_curl_line_of_readme_is_answered(tmp_path):
    shutil.copy(spoken(tmp_path / "a.wav", 1.0), tmp_path / "a.mp3")  # what it is, its first bytes say
    lines = readme_commands()
    made, = [line for line in lines if line.endswith("> features.json")]
    made = made.replace("python ", f"{sys.executable} ")
    subprocess.run(made, shell=True, cwd=tmp_path, check=True, timeout=PATIENCE)
    with serving(serving_system(mels=80)) as server:
        for line in [line for line in lines if line.startswith("curl ")]:
            host, port = server.server_address
            command = line.replace("localhost:8000", f"{host}:{port}") + " --fail-with-body --silent --show-error"
            done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
            assert done.returncode == 0, (line, done.stdout, done.stderr)

def test_ci_runs_the_test_command_of_readme():
    command = re.search(r"python -m pytest \S+ test_all\.py", (HERE / "README.md").read_text()).group(0)
    assert command.removeprefix("python ") in (HERE / ".ci/run").read_text()
