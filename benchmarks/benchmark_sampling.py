"""Tokens per CPU-second of the samplers, one thread, in turns with forms written from the papers' definitions.

    python benchmarks/benchmark_sampling.py [--json] [--checkpoint CKPT --text FILE [--temperature 0.5]]

llada    LLaDA's generate loop: logits of all positions, float64 Gumbel over the vocabulary, low-confidence order; ours
         is `low_confidence`. Equal passes, same random weights.
mdlm     MDLM's cache for `ancestral`: the probabilities of all positions are kept while no row of the batch changes,
         and every position draws from (token, stay masked) at every step; 1000 steps, same random weights.
blocks   with a checkpoint: blocks, kept keys and the confidence threshold against one token a pass over whole rows in
         the same order, with an n-gram judge of the FILE it was trained on. All are sampled, timed and judged in turns.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.common import arguments, cpu_seconds, machine, median_ratio, report
from dlm_scale.config import ModelConfig
from dlm_scale.data.vocabulary import Vocabulary
from dlm_scale.model.transformer import Transformer
from dlm_scale.sampling import Sampler, generate

LLADA = {"shape": {"num_layers": 6, "hidden_size": 384, "num_heads": 6, "seq_len": 256}, "vocab": 50257, "rows": 2,
         "steps": 8}  # fmt: skip
MDLM = {"shape": {"num_layers": 4, "hidden_size": 128, "num_heads": 4, "seq_len": 128}, "vocab": 512, "rows": 8,
        "steps": 1000}  # fmt: skip


def network(shape: dict, vocab: int):
    """Random weights: (logits of all positions [B, L, V], predict)."""
    config = ModelConfig(tied=False, **shape)
    model = Transformer(config, Vocabulary(vocab + 1, vocab)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))

    def logits(x_BL):
        rows_N = torch.arange(x_BL.numel())
        return model(x_BL, rows_N=rows_N, readout=lambda head: head.logits()).view(*x_BL.shape, -1)

    def predict(x_BL, rows_N):
        return model(x_BL, rows_N=rows_N, readout=lambda head: head.log_probs())

    return logits, predict


@torch.no_grad()
def llada_generate(logits, x_BL, steps: int, mask_id: int):
    """LLaDA (arXiv 2502.09992), low-confidence remasking, temperature 1: equal counts, the rest to the first steps."""
    each, rest = divmod(x_BL.shape[1], steps)
    for step in range(steps):
        logits_BLV = logits(x_BL)
        noise_BLV = torch.rand(logits_BLV.shape, dtype=torch.float64)
        drawn_BL = (logits_BLV.double() - (-noise_BLV.log()).log()).argmax(-1)
        share_BL = logits_BLV.double().softmax(-1).gather(-1, drawn_BL[..., None])[..., 0]
        score_BL = torch.where(x_BL == mask_id, share_BL, -math.inf)
        best_BK = score_BL.topk(each + (step < rest), dim=1).indices
        x_BL = x_BL.scatter(1, best_BK, drawn_BL.gather(1, best_BK))
    return x_BL


@torch.no_grad()
def mdlm_cached(logits, x_BL, steps: int, mask_id: int):
    """MDLM (arXiv 2406.07524), ddpm_cache: linear grid, one kept p(x0) for the batch, Gumbel over ids and the mask."""
    kept_BLV = None
    for step in range(steps):
        t, s = 1 - step / steps, 1 - (step + 1) / steps
        if kept_BLV is None:
            kept_BLV = logits(x_BL).softmax(-1)
        posterior_BLV = torch.nn.functional.pad(kept_BLV * (t - s), (0, 1), value=s)  # the mask is the last id
        exponential_BLV = -(torch.rand_like(posterior_BLV) + 1e-10).log()
        drawn_BL = (posterior_BLV / (exponential_BLV + 1e-10)).argmax(-1)
        next_BL = torch.where(x_BL == mask_id, drawn_BL, x_BL)
        if not next_BL.equal(x_BL):
            kept_BLV = None
        x_BL = next_BL
    return x_BL


def ours(predict, shape: dict, rows: int, sampler: "str | Sampler", steps: int, seed: int, mask_id: int, **settings):
    x_BL = torch.full((rows, shape["seq_len"]), mask_id)
    return generate(
        predict, x_BL, torch.zeros_like(x_BL, dtype=torch.bool), sampler=sampler, num_steps=steps, seed=seed,
        request_hashes=[0] * rows, sample_indices=range(rows), mask_id=mask_id, **settings,
    )  # fmt: skip


def against(baseline, name: str, case: dict, sampler: str, repeats: int) -> dict:
    """Tokens per CPU-second of the baseline and of ours, and the ratio."""
    logits, predict = network(case["shape"], case["vocab"])
    x_BL = torch.full((case["rows"], case["shape"]["seq_len"]), case["vocab"])
    arms = {
        name: lambda repeat: baseline(logits, x_BL, case["steps"], case["vocab"]),
        "ours": lambda repeat: ours(predict, case["shape"], case["rows"], sampler, case["steps"], repeat + 1,
                                    case["vocab"]),
    }  # fmt: skip
    seconds = cpu_seconds(arms, repeats)
    speeds = {f"{name}_tokens_per_second_{arm}": x_BL.numel() / statistics.median(s) for arm, s in seconds.items()}
    return speeds | {f"{name}_ratio": median_ratio(seconds[name], seconds["ours"])}


class Judge:
    """Witten-Bell n-grams (order 6) of a text's characters; nats of a character given the five before it."""

    order = 6

    def __init__(self, text: str):
        self.size = len(set(text))
        self.counts = [Counter(text[i : i + n] for i in range(len(text) - n + 1)) for n in range(1, self.order + 1)]
        self.total = [Counter() for _ in self.counts]
        self.kinds = [Counter() for _ in self.counts]
        for counts, total, kinds in zip(self.counts, self.total, self.kinds):
            for gram, count in counts.items():
                total[gram[:-1]] += count
                kinds[gram[:-1]] += 1

    def probability(self, before: str, char: str) -> float:
        p = 1 / self.size
        for n, (counts, total, kinds) in enumerate(zip(self.counts, self.total, self.kinds)):
            context = before[len(before) - n :]
            if total[context] == 0:
                break
            p = (counts[context + char] + kinds[context] * p) / (total[context] + kinds[context])
        return p

    def nats(self, text: str) -> float:
        """Mean over the characters that have a whole context."""
        first = self.order - 1
        places = range(first, len(text))
        return statistics.fmean(-math.log(self.probability(text[i - first : i], text[i])) for i in places)


def unigram_entropy(text: str) -> float:
    return -sum(n / len(text) * math.log(n / len(text)) for n in Counter(text).values())


def block_arms() -> dict[str, dict]:
    """The settings that are tried, by name; `plain`, one token a pass with the surest first, is the measure."""
    surest_first = Sampler(selector="max_prob")
    arms = {"plain": {"sampler": surest_first}}
    for size in (16, 32):
        arms[f"dual{size}_threshold"] = {"sampler": "threshold", "block_size": size, "cache": "dual"}
    arms["dual32"] = {"sampler": surest_first, "block_size": 32, "cache": "dual"}
    return arms


def blocks(checkpoint: str, text: str, num_rows: int, temperature: float, batch: int = 8) -> dict:
    """Every arm on the same seeds, batch by batch in turns: tokens per CPU-second, passes, judge and entropy."""
    from dlm_scale.inference import load_for_inference

    inference = load_for_inference(checkpoint, device="cpu")
    judge = Judge(text[: int(0.9 * len(text))])
    length, arms = inference.seq_len, block_arms()
    seconds, made = {name: 0.0 for name in arms}, {name: [] for name in arms}
    passes = dict.fromkeys(arms, 0)
    for number in range(num_rows // batch):
        for name, settings in arms.items():
            start = time.process_time()
            mask_id = inference.vocabulary.mask_id
            result = ours(inference.predict, {"seq_len": length}, batch, settings["sampler"], length, number, mask_id,
                          temperature=temperature, **{k: v for k, v in settings.items() if k != "sampler"})  # fmt: skip
            seconds[name] += time.process_time() - start
            passes[name] += int(result.nfe_B.sum())
            made[name] += [inference.tokenizer.decode(row) for row in result.ids_BL.tolist()]
    held_out = text[int(0.9 * len(text)) :]
    rows = [held_out[i * length : (i + 1) * length] for i in range(min(num_rows, len(held_out) // length))]
    found = {"blocks_judge_real": statistics.fmean(map(judge.nats, rows))}
    for name in arms:
        nats = [judge.nats(row) for row in made[name]]
        entropy = [unigram_entropy(row) for row in made[name]]
        found |= {
            f"blocks_{name}": {
                "tokens_per_second": round(length * len(nats) / seconds[name], 2),
                "speed_up": round(seconds["plain"] / seconds[name], 3),
                "passes": round(passes[name] / len(nats), 2),
                "perplexity": round(math.exp(statistics.fmean(nats)), 4),
                "perplexity_relative_error": round(statistics.stdev(nats) / math.sqrt(len(nats)), 4),
                "entropy": round(statistics.fmean(entropy), 4),
            }
        }
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--checkpoint", help="a run folder or checkpoint of a character model: adds `blocks`")
    parser.add_argument("--text", type=Path, help="the text it was trained on, for the judge")
    parser.add_argument("--quality_rows", type=int, default=32, help="rows of each arm of `blocks`")
    parser.add_argument("--temperature", type=float, default=1.0, help="of every arm of `blocks`")
    parser.add_argument("--only", choices=("llada", "mdlm", "blocks"), help="one part alone")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {"benchmark": "sampling", "repeats": args.repeats} | machine()
    if args.only in (None, "llada"):
        results |= against(llada_generate, "llada", LLADA, "low_confidence", args.repeats)
    if args.only in (None, "mdlm"):
        results |= against(mdlm_cached, "mdlm", MDLM, "ancestral", args.repeats)
    if args.checkpoint and args.only in (None, "blocks"):
        results |= {"blocks_rows": args.quality_rows, "blocks_temperature": args.temperature}
        text = args.text.read_text(encoding="utf-8")
        results |= blocks(args.checkpoint, text, args.quality_rows, args.temperature)
    report(results, args.json)


if __name__ == "__main__":
    main()
