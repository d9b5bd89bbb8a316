"""Every claim of the project, in the order of the import ladder. Each test has an oracle; `SLOW=1` runs the slow ones too.

    python -m pytest -q test_all.py
"""
import functools
import inspect
import json
import pathlib
import random
import re
import unicodedata
from dataclasses import fields, is_dataclass, replace

import pytest
import torch

import config
from tokenizer import (BLANK, Counts, EOS, SOS, SPECIALS, Tokenizer, UNK, align, char_errors, count_errors, format_alignment, normalise_text, token_accuracy, word_errors)

HERE = pathlib.Path(__file__).resolve().parent
SHARED = HERE.parent / "shared"


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
    ("1.5e+3", 1500.0), ("true", True), ("FALSE", False), ("null", None), ("~", None), ("abc", "abc"),
    ("it's", "it's"), ("a  b", "a  b"), ("x:y", "x:y"), ("a#b", "a#b"), ("-x", "-x"), ("é中", "é中"), ("''", ""),
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
    yaml, paths = pytest.importorskip("yaml"), sorted(SHARED.glob("funasr_kit/*/config.yaml"))
    if not paths:
        pytest.skip(f"no FunASR configs under {SHARED}")
    for path in paths:
        assert same_value(config.parse_yaml(path.read_text(), path.name), yaml.safe_load(path.read_text())), path


def test_yaml_mutations_give_pyyamls_value_or_name_the_line():
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
    ("a: >\n  text", 1), ("a: 1\n---\nb: 2", 2), ("%YAML 1.1\na: 1", 1), ("a: {b: 1}", 1), ("a: [1,\n 2]", 1),
    ("a: 'x\n  y'", 1), ("? a\n: b", 1), ("<<: 1", 1), ("a: =", 1), ("1: a", 1), ("true: a", 1), ("- a", 1),
    ("a: b: c", 1), ("a: 'b'c", 1), ("a: [b", 1), ("a: [b] c", 1), ("a: [,]", 1),
    ("a: - b", 1), (r'a: "\q"', 1), (r'a: "\U00110000"', 1), ("a: \x00", 1), ("a: 1\rb: 2", 1), ("a: yes", 1),
    ("a: Off", 1), ("a: 010", 1), ("a: 0x1f", 1), ("a: 0b1", 1), ("a: 0o7", 1), ("a: 1:30", 1), ("a: 1_000", 1),
    ("a: 2020-01-01", 1), ("a: .inf", 1), ("a: -.NaN", 1), ("a: -.5", 1), ("a: 1e999", 1), ("a: 1" + "0" * 9999, 1),
    ("a: " + "[" * 9999, 1), ("a:\n  " + "- " * 9999, 1)])
def test_yaml_outside_the_subset_names_its_line(text, line):
    with pytest.raises(ValueError, match=rf"\Af\.yaml:{line}: wanted [^\n]+\Z"):
        config.parse_yaml(text, "f.yaml")


@pytest.mark.parametrize("text, value", [("1e-4", 0.0001), ("1E5", 1e5), ("-2.5e3", -2500.0), ("+1.e2", 100.0)])
def test_yaml_exponents_make_floats(text, value):
    assert config.parse_yaml(f"a: {text}\nb: [{text}]") == {"a": value, "b": [value]}


# ---- config: load, dump, check ----

def written(tmp_path, text: str) -> str:
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    return str(tmp_path / "a.yaml")


def leaves(section, path=()):
    for f in fields(section):
        value = getattr(section, f.name)
        yield from leaves(value, (*path, f.name)) if is_dataclass(value) else [((*path, f.name), value)]


def random_config(rng, section):
    def draw(value):
        if is_dataclass(value):
            return random_config(rng, value)
        if isinstance(value, tuple):
            return tuple(draw(rng.choice(value)) for _ in range(rng.randint(0, 3)))
        if isinstance(value, str):
            return "".join(rng.choices("ab1e \t\n\r\0'\"\\:#[]{},-é中\x85\u2028\ufeff\ud800😀", k=rng.randint(0, 8)))
        whole = isinstance(value, int)
        return rng.getrandbits(70) - 2**69 if whole else rng.uniform(-1, 1) * 10.0 ** rng.randint(-300, 300)
    return replace(section, **{f.name: draw(getattr(section, f.name)) for f in fields(section)})


def test_issue_file_loads_word_for_word(tmp_path):
    loaded = config.load(written(tmp_path, ISSUE_FILE))
    model, training = loaded.model, loaded.training
    assert (model.name, model.predictor.hidden_dim, model.predictor.num_layers) == ("paraformer", 256, 2)
    for part in (model.encoder, model.decoder):
        assert (part.num_layers, part.hidden_dim, part.num_heads, part.dropout) == (6, 512, 8, 0.1)
    assert (training.batch_size, training.num_epochs, training.warmup_steps) == (16, 100, 1000)
    assert (training.learning_rate, training.max_grad_norm) == (0.0001, 1.0)
    assert (HERE / "configs" / "paraformer.yaml").read_text().startswith(ISSUE_FILE)


@pytest.mark.parametrize("path", sorted((HERE / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_load(path):
    assert config.load(str(path)).model.name == config.parse_yaml(path.read_text())["model"]["name"]


def test_dump_then_parse_gives_the_same_config_to_the_last_bit():
    rng = random.Random(0)
    for _ in range(100):
        drawn = random_config(rng, config.Config())
        text, values = config.dump(drawn), config.to_dict(drawn)
        assert config.from_dict(config.parse_yaml(text), "x") == config.from_dict(values, "x") == drawn
        assert repr(config.parse_yaml(text)) == repr(values)


def test_dump_then_load_gives_the_same_config_and_pyyaml_agrees(tmp_path):
    data = {"train": " a: #'\"\\\n\u2028é😀", "dev": "null", "augment": {"speeds": [0.9, 1, 1.1]}}
    odd = config.from_dict({"data": data, "training": {"learning_rate": 1e-5, "weight_decay": 1e22}}, "test")
    path = written(tmp_path, config.dump(odd))
    assert config.load(path) == odd
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(pathlib.Path(path).read_text(encoding="utf-8")) == config.to_dict(odd)


def test_overrides_do_what_editing_the_file_does(tmp_path):
    edited = ISSUE_FILE.replace("batch_size: 16", "batch_size: 8").replace("dropout: 0.1", "dropout: 0", 1)
    edited += "data:\n  augment:\n    speeds:\n    - 0.9\n    - 1\n  train: 'a=b'\n"
    wanted = config.load(written(tmp_path, edited))
    overrides = ["--training.batch_size=8", "--model.encoder.dropout=0", "--data.augment.speeds=[0.9, 1]"]
    assert config.load(written(tmp_path, ISSUE_FILE), [*overrides, "--data.train=a=b"]) == wanted
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
    with pytest.raises(ValueError) as caught:
        config.load(path)
    assert str(caught.value) == f"{path}:{message}"


@pytest.mark.parametrize("override, message", [
    ("--training.batch_size=big", "training.batch_size: wanted int, got 'big'"),
    ("--training.lr=1", "unknown key 'training.lr' (did you mean 'training.learning_rate'?)"),
    ("--model=3", "model: wanted a section"),
    ("--model.name.x=3", "model.name: wanted str, got {'x': 3}"), ("--training.seed", "wanted --section.key=value"),
    ("training.seed=1", "wanted --section.key=value"), ("--training.seed=yes", "wanted true, false, a plain decimal"),
    ("--data.train=a\tb", "wanted printable text"), ("--=3", "wanted --section.key"), ("--training.=3", "unknown key")])
def test_wrong_overrides_name_themselves(tmp_path, override, message):
    with pytest.raises(ValueError) as caught:
        config.load(written(tmp_path, ISSUE_FILE), [override])
    assert str(caught.value).startswith(f"{override}: {message}") and "\n" not in str(caught.value)


def test_unreadable_files_are_one_line_that_names_the_path(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"model:\n  name: \xe9\n")
    for path in (tmp_path / "none.yaml", tmp_path, tmp_path / "latin.yaml"):
        with pytest.raises(ValueError, match=rf"\A{re.escape(str(path))}: wanted a config in YAML [^\n]+\Z"):
            config.load(str(path))


BROKEN = {  # override -> the line that it adds to the one error
    "--model.encoder.num_heads=7": "model.encoder.num_heads: wanted a divisor of hidden_dim 512, got 7",
    "--model.decoder.hidden_dim=100": "model.decoder.num_heads: wanted a divisor of hidden_dim 100, got 8",
    "--model.encoder.dropout=1": "model.encoder.dropout: wanted at least 0 and below 1, got 1.0",
    "--model.predictor.kernel_size=4": "model.predictor.kernel_size: wanted odd and above 0, got 4",
    "--model.predictor.num_layers=0": "model.predictor.num_layers: wanted 1 or more, got 0",
    "--model.encoder.subsampling=3": "model.encoder.subsampling: wanted 1 | 2 | 4, got 3",
    "--model.encoder.kind=conformr": "model.encoder.kind: wanted transformer | conformer, got 'conformr' "
                                     "(did you mean 'conformer'?)",
    "--model.sampling_ratio=1.5": "model.sampling_ratio: wanted between 0 and 1, got 1.5",
    "--training.schedule=cos": "training.schedule: wanted cosine | inverse_sqrt | constant, got 'cos' "
                               "(did you mean 'cosine'?)",
    "--training.warmup_steps=-1": "training.warmup_steps: wanted 0 or more, got -1",
    "--training.learning_rate=0": "training.learning_rate: wanted above 0, got 0.0",
    "--data.toy.max_symbols=2": "data.toy.max_symbols: wanted at least min_symbols 3, got 2",
    "--data.toy.max_frames=17": "data.toy.max_frames: wanted at least 3 x min_frames 6, got 17",
    "--data.toy.blend_frames=7": "data.toy.blend_frames: wanted at most min_frames 6, got 7",
    "--data.max_sec=0.05": "data.max_sec: wanted at least min_sec 0.1, got 0.05",
    "--data.augment.speeds=[1, -1]": "data.augment.speeds: wanted above 0, got [1.0, -1.0]",
    "--data.augment.freq_width=81": "data.augment.freq_width: wanted at most num_mels 80, got 81",
    "--data.kind=manifest": "data.train: wanted a manifest or a Kaldi folder, as data.kind is manifest, got ''"}


def test_check_lists_every_violation_in_one_error(tmp_path):
    path = written(tmp_path, ISSUE_FILE)
    for override, line in BROKEN.items():
        with pytest.raises(ValueError) as caught:
            config.load(path, [override])
        assert str(caught.value).split("\n  ")[1] == line and str(caught.value).startswith(f"{path} {override}: wanted")
    with pytest.raises(ValueError) as caught:
        config.load(path, list(BROKEN))
    dev = "data.dev: wanted a manifest or a Kaldi folder, as data.kind is manifest, got ''"
    assert sorted(str(caught.value).split("\n  ")[1:]) == sorted([*BROKEN.values(), dev])


def test_every_field_has_a_comment_and_every_number_a_range():
    ranged = {name for _, names in config.RANGES.values() for name in names.split()}
    known = {".".join(path) for path, _ in leaves(config.Config())}
    for path, value in leaves(config.Config()):
        numeric = isinstance(value[0] if isinstance(value, tuple) and value else value, (int, float))
        assert not numeric or isinstance(value, bool) or path[-1] in ranged or ".".join(path) in config.CHOICES, path
    assert set(config.CHOICES) <= known and ranged <= {path.split(".")[-1] for path in known}
    for line in re.findall(r"^    \w+: (?:int|float|bool|str|tuple).*= .*", inspect.getsource(config), re.MULTILINE):
        assert re.search(r"  # \S", line), line


# ---- tokenizer: texts and ids ----

ODD = [*"İẞßΣςﬁＡｶﾞ①½´ÅK가각\u1100\u1161\u11a8\u0301\u0323\u0307\U0001d170\u00a0\u3000\u2028\x1c\t\n\ud800\udfff",
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
    ("a\ud800b", "a\ufffdb"),
])
def test_normalise_text_gives_the_planted_form(text, wanted):
    assert normalise_text(text) == wanted


def test_normalise_text_is_idempotent_and_writable():
    texts = random_texts(0, 5000) + ["İ\U0001d170"]  # the last: NFKC then lower case once is not enough
    lowered_once = [unicodedata.normalize("NFKC", t).lower() for t in texts]
    assert unicodedata.normalize("NFKC", lowered_once[-1]) != lowered_once[-1]
    for once in map(normalise_text, texts):
        assert normalise_text(once) == once == once.encode("utf-8").decode("utf-8")
        assert once == once.strip() and "  " not in once and (not once or once.split(" ") == once.split())


@pytest.mark.parametrize("unit", ["char", "word"])
def test_decode_undoes_encode_and_files_keep_the_vocabulary(unit, tmp_path):
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


def test_planted_ids_counts_and_specials():
    char = Tokenizer.build(["Ba b", "c b"], min_count=2)
    assert char.state() == {"unit": "char", "symbols": ["<blank>", "<sos>", "<eos>", "<unk>", " ", "b"]}
    assert (BLANK, SOS, EOS, UNK, len(char)) == (0, 1, 2, 3, 6)
    assert char.encode("B x") == [5, 4, 3] and char.decode([1, 5, 4, 3, 0, 2]) == "b <unk>"
    word = Tokenizer.build(["The <blank> cat <EOS>"], unit="word")
    assert word.symbols == SPECIALS + ("cat", "the")
    assert word.encode("THE <blank> dog cat") == [5, UNK, UNK, 4] and word.decode([5, 3, 4, 2]) == "the <unk> cat"
    for ids in ([6], [-1]):
        with pytest.raises(ValueError, match=rf"ids must be in 0\.\.5, got {ids[0]}"):
            word.decode(ids)


@pytest.mark.parametrize("text, message", [
    ("{oops", "got no JSON"), (b"\xff\xfe", "got no JSON"), ("[1]", r"wanted \{'unit'.* got \[1\]"),
    ({"unit": "char"}, "wanted {'unit'"), ({"unit": "char", "symbols": "abc"}, "wanted {'unit'"),
    ({"unit": "bpe", "symbols": [*SPECIALS]}, "must be one of .'char', 'word'., got 'bpe'"),
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


def test_alignment_is_minimal_and_spells_both_sides():
    for ref, hyp in random_pairs(0, 1500):
        steps, counts = align(ref, hyp), count_errors(ref, hyp)
        assert [r for op, r, _ in steps if op != "ins"] == ref and [h for op, _, h in steps if op != "del"] == hyp
        assert all({"hit": r == h, "sub": r != h, "ins": r is None, "del": h is None}[op] for op, r, h in steps)
        assert (counts.errors, counts.sub) == best_by_recursion(ref, hyp) and counts.ref == len(ref)
        assert [op for op, _, _ in steps].count("ins") == counts.ins and counts.ins - counts.del_ == len(hyp) - len(ref)
        swapped = count_errors(hyp, ref)
        assert (swapped.sub, swapped.ins, swapped.del_) == (counts.sub, counts.del_, counts.ins)


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


def test_ties_keep_hits_and_are_settled_from_the_end():
    assert align("ab", "bc") == [("del", "a", None), ("hit", "b", "b"), ("ins", None, "c")]  # 2 edits, not 2 sub
    assert align("aa", "a") == [("del", "a", None), ("hit", "a", "a")]
    assert align("ab", "x") == [("del", "a", None), ("sub", "b", "x")]
    assert align([], []) == [] and align([], "a") == [("ins", None, "a")]


@pytest.mark.parametrize("ref, hyp, chars, words", [  # totals: jiwer 4.0.0 on the normalised texts
    ("The cat sat.", "a  CAT sat", Counts(sub=1, del_=3, ref=12), Counts(sub=2, ref=3)),
    ("ab cd", "abcd", Counts(del_=1, ref=5), Counts(sub=1, del_=1, ref=2)),
    ("今天天气", "今天气好", Counts(del_=1, ins=1, ref=4), Counts(sub=1, ref=1)),
    ("", "a b", Counts(ins=3), Counts(ins=2)),
])
def test_text_errors_count_normalised_characters_with_spaces_and_words(ref, hyp, chars, words):
    assert (char_errors(ref, hyp), word_errors(ref, hyp)) == (chars, words)


def test_counts_add_and_divide_once():
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
