"""What a model makes of one utterance, drawn: after an epoch of training, and step by step on its way to the text.

Reading order: the pictures of an epoch and their page, the way through a model. Needs torch and what its imports name.
"""
from pathlib import Path

import torch
from torch import nn

import data
from audio import frame_sec
from files import write_atomic
from model import Paraformer, in_feature_frames
from plot import epochs_page, explain_svg
from report import utterance_svgs
from step import inputs
from tokenizer import spoken_places


# ---- epoch by epoch ----

PICTURED = 3  # dev utterances that training.picture_epochs draws


@torch.no_grad()
def draw(run, item: data.Utterance) -> dict[str, str]:
    """The `utterance_svgs` of an utterance as the run's model decodes it now: alignment and last cross-attention."""
    model, hop_sec = run.average.eval(), frame_sec(run.config.data)
    feats, feat_lens = inputs(data.collate([item]), model)[:2]
    found = model.greedy(feats, feat_lens)
    ids = found.tokens[0, :found.lens[0]].tolist()
    edges = (found.boundaries[0] * hop_sec).tolist()
    tokens = [(run.tokenizer.decode([ids[u]]), edges[u], edges[u + 1]) for u in spoken_places(ids)]
    layers = model.cross_attention(*model.encode(feats, feat_lens), found.tokens, found.lens)
    title = f"{item.key}: {item.text}, recognised as {run.tokenizer.decode(ids)}"
    return utterance_svgs(title, item, found, tokens, run.config, cross_layers=layers)


def write_pictures(run, epoch: int) -> None:
    """pictures/<number>_<kind>_<epoch>.svg of the first dev utterances, and index.html to step through alignments."""
    folder = run.folder / "pictures"
    folder.mkdir(exist_ok=True)
    for index in range(min(PICTURED, run.config.training.overfit or PICTURED, len(run.dev_set))):
        item = run.dev_set[index]
        for kind, svg in draw(run, item).items() if isinstance(item, data.Utterance) else ():
            write_atomic(folder / f"{index + 1}_{kind}_{epoch:04d}.svg", svg)
    names = sorted(path.name for path in folder.glob("*_alignment_*.svg"))
    write_atomic(folder / "index.html", epochs_page(run.folder.name, names))


# ---- the way through a model ----

@torch.inference_mode()
def explain(model: nn.Module, config, symbols: tuple[str, ...], item: data.Utterance, device: torch.device) -> str:
    """One SVG that follows an utterance: features, weights, token embeddings, first and second guess, text and times.
    Raises ValueError if the model is no Paraformer."""
    if not isinstance(model, Paraformer):
        raise ValueError(f"--explain: wanted a Paraformer, which has firing weights, got a {config.model.name}")
    feats, lens = item.feats[None].to(device), torch.tensor([len(item.feats)], device=device)
    hop_sec = frame_sec(config.data)
    hidden, hidden_lens = model.encode(feats, lens)
    found = model.decode(hidden, hidden_lens, lens)
    counts, embeds = model.integrate(hidden, found.alpha)
    logits = model.predict(embeds, counts, hidden, hidden_lens, found.alpha).logits
    shares, ids = logits[0].float().softmax(-1).topk(2)  # (U,2)
    edges = (found.boundaries[0] * hop_sec).tolist()
    places = spoken_places(found.tokens[0].tolist())
    tokens = [(symbols[ids[u, 0]], edges[u], edges[u + 1]) for u in places]
    seconds = [(symbols[ids[u, 1]], float(shares[u, 1])) for u in places]
    L = found.alpha.shape[1]
    span = in_feature_frames(0, config.model.encoder) * hop_sec, in_feature_frames(L, config.model.encoder) * hop_sec
    title = f"{Path(item.key).name}: {' '.join(text for text, _, _ in tokens)}"
    return explain_svg(title, item.feats, found.alpha[0].cpu(), embeds[0, places].float().cpu(), tokens,
                       shares[places, 0].tolist(), seconds, len(item.feats) * hop_sec, span)
