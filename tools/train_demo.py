"""Train KuiperLLM's demo model, a Llama of 3.7 million weights that writes Shakespearean dialogue.

The corpus is Tiny Shakespeare (1.1 MB, public domain): `data/tinyshakespeare/input.txt` of the GitHub
repository karpathy/char-rnn, SHA-256 86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed. Two
steps make the model. The first needs torch, tokenizers and safetensors, and writes a folder in Hugging Face's
layout (`config.json`, `model.safetensors`, `tokenizer.json`). The second needs NumPy, safetensors and gguf:

    python tools/train_demo.py --corpus input.txt --out build/demo --device cuda
    python tools/train_demo.py --export build/demo --out src/kuiperllm/data/demo.gguf

The first step took three minutes on an H100 that five other runs shared. The tokenizer and the export are
deterministic; the weights are not, since BPE dropout draws from a generator that no seed reaches.

So small a corpus is read more than a hundred times over, so the recipe is mostly about not learning it by
heart: dropout, weight decay, random crops, BPE dropout, and the weights of the step with the lowest loss on
the last 5 % of the text, which training never sees. That was step 700 of 2000, at 3.357 nats per token (1.487
per character). The defaults are the best of six settings tried: without BPE dropout, dropout 0.2 to 0.4 and
weight decay 0.1 to 1.5 gave 3.468 to 3.526; with it, dropout 0.2 and weight decay 1.0 gave 3.368. Step and
setting were both chosen on those 5 %, so the figure flatters the model a little.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

    Weights = dict[str, torch.Tensor]

BOS = "<|endoftext|>"
BOS_ID = 0

# Every matrix has rows of a multiple of 32 weights, so that all can be stored as Q8_0 blocks of 32.
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": BOS_ID,
    "eos_token_id": BOS_ID,
    "torch_dtype": "float32",
}

WARMUP_STEPS = 100
EVAL_EVERY = 50


# --- text -------------------------------------------------------------------------------------------------


def split_corpus(text: str) -> tuple[str, str]:
    """The first 95 % and the last 5 % of the text, cut between two speeches."""
    cut = text.rindex("\n\n", 0, len(text) * 95 // 100) + 2
    return text[:cut], text[cut:]


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """Byte-level BPE with GPT-2's rule for cutting text into words: GGUF's model "gpt2", pre "gpt-2"."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def encode_stream(tokenizer: Tokenizer, text: str, *, bpe_dropout: float) -> list[int]:
    """The text as one stream of token ids.

    With BPE dropout (Provilkov et al. 2020) the stream holds the text sixteen times: eight times as usual and
    eight times with each merge left out at random, so that a word is seen in several spellings.
    """
    plain = tokenizer.encode(text).ids
    if not bpe_dropout:
        return plain
    tokenizer.model.dropout = bpe_dropout
    varied = [token for _ in range(8) for token in tokenizer.encode(text).ids]
    tokenizer.model.dropout = None
    return plain * 8 + varied


class Crops:
    """Random training sequences: half start anywhere, half are a BOS and the text from a speaker's name on.

    The second half teaches the model to begin well after an empty prompt.
    """

    def __init__(self, stream: list[int], newline_id: int, device: str) -> None:
        import torch

        self.length = CONFIG["max_position_embeddings"]
        self.stream = torch.tensor(stream, device=device)
        newline = self.stream == newline_id
        speeches = torch.nonzero(newline[:-1] & newline[1:])[:, 0] + 2
        self.speeches = speeches[speeches < len(stream) - self.length]
        self.window = torch.arange(self.length + 1, device=device)

    def batch(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, each [size, length]."""
        import torch

        device = self.stream.device
        anywhere = torch.randint(len(self.stream) - self.length, (size - size // 2,), device=device)
        chosen = torch.randint(len(self.speeches), (size // 2,), device=device)
        rows = self.stream[anywhere[:, None] + self.window]
        spoken = self.stream[self.speeches[chosen][:, None] + self.window[:-1]]
        spoken = torch.cat([torch.full_like(spoken[:, :1], BOS_ID), spoken], dim=1)
        rows = torch.cat([rows, spoken])
        return rows[:, :-1], rows[:, 1:]


# --- the model: weights in a dict under their Hugging Face names ------------------------------------------


def init_weights(device: str) -> Weights:
    """Normal(0, 0.02); as in GPT-2, less by the root of their number for projections into the residual."""
    import torch

    hidden, intermediate = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    q_size = CONFIG["num_attention_heads"] * CONFIG["head_dim"]
    kv_size = CONFIG["num_key_value_heads"] * CONFIG["head_dim"]
    shapes = {"model.embed_tokens.weight": (CONFIG["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for layer in range(CONFIG["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (hidden,),
                "self_attn.q_proj": (q_size, hidden),
                "self_attn.k_proj": (kv_size, hidden),
                "self_attn.v_proj": (kv_size, hidden),
                "self_attn.o_proj": (hidden, q_size),
                "post_attention_layernorm": (hidden,),
                "mlp.gate_proj": (intermediate, hidden),
                "mlp.up_proj": (intermediate, hidden),
                "mlp.down_proj": (hidden, intermediate),
            }.items()
        }
    weights = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            weight = torch.ones(shape)
        else:
            adds_to_residual = "o_proj" in name or "down_proj" in name
            scale = (2 * CONFIG["num_hidden_layers"]) ** -0.5 if adds_to_residual else 1.0
            weight = torch.randn(shape) * 0.02 * scale
        weights[name] = weight.to(device).requires_grad_()
    return weights


def rotary_tables(length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, each [length, head_dim]; both halves of a head turn by the same angles."""
    import torch

    head_dim = CONFIG["head_dim"]
    exponents = torch.arange(0, head_dim, 2, device=device) / head_dim
    angles = torch.arange(length, device=device)[:, None] * CONFIG["rope_theta"] ** -exponents
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding in the half-split form: x[i] pairs with x[i + head_dim / 2]."""
    import torch

    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def forward(weights: Weights, input_ids: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
    """Logits [B, T, V] of the decoder for input ids [B, T]."""
    import torch.nn.functional as F

    batch, length = input_ids.shape
    eps = CONFIG["rms_norm_eps"]
    cos, sin = rotary_tables(length, input_ids.device)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], weights[name + ".weight"], eps)

    def heads(x: torch.Tensor, name: str) -> torch.Tensor:
        x = F.linear(x, weights[name + ".weight"])
        return x.view(batch, length, -1, CONFIG["head_dim"]).transpose(1, 2)  # [B, heads, T, d]

    def attention(x: torch.Tensor, prefix: str) -> torch.Tensor:
        q = rotate(heads(x, prefix + "q_proj"), cos, sin)
        k = rotate(heads(x, prefix + "k_proj"), cos, sin)
        v = heads(x, prefix + "v_proj")
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        out = out.transpose(1, 2).reshape(batch, length, -1)
        return F.dropout(F.linear(out, weights[prefix + "o_proj.weight"]), dropout)

    def mlp(x: torch.Tensor, prefix: str) -> torch.Tensor:
        gate = F.silu(F.linear(x, weights[prefix + "gate_proj.weight"]))
        up = F.linear(x, weights[prefix + "up_proj.weight"])
        return F.dropout(F.linear(gate * up, weights[prefix + "down_proj.weight"]), dropout)

    x = F.dropout(F.embedding(input_ids, weights["model.embed_tokens.weight"]), dropout)
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        x = x + attention(norm(x, prefix + "input_layernorm"), prefix + "self_attn.")
        x = x + mlp(norm(x, prefix + "post_attention_layernorm"), prefix + "mlp.")
    return F.linear(norm(x, "model.norm"), weights["model.embed_tokens.weight"])


# --- training ---------------------------------------------------------------------------------------------


def mean_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood per token, in nats."""
    import torch.nn.functional as F

    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    warmup = min(WARMUP_STEPS, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def save_checkpoint(folder: Path, weights: Weights, tokenizer: Tokenizer) -> None:
    """Write the folder that `--export` reads; any Hugging Face tool reads it too."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: weight.detach().cpu() for name, weight in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))


def sample(
    weights: Weights, tokenizer: Tokenizer, prompt: str, *, max_tokens: int, temperature: float
) -> str:
    """A continuation of the prompt, which is part of what is returned."""
    import torch

    device = weights["model.norm.weight"].device
    ids = [BOS_ID, *tokenizer.encode(prompt).ids]
    for _ in range(max_tokens):
        window = torch.tensor([ids[-CONFIG["max_position_embeddings"] :]], device=device)
        with torch.no_grad():
            logits = forward(weights, window)[0, -1].float()
        ids.append(int(torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1)))
    return tokenizer.decode(ids)


def train(args: argparse.Namespace) -> None:
    """Train, keep the weights with the lowest validation loss in `args.out`, and print three samples."""
    import torch
    from safetensors.torch import load_file

    torch.manual_seed(args.seed)
    train_text, val_text = split_corpus(args.corpus.read_text(encoding="utf-8"))
    tokenizer = train_tokenizer(train_text, CONFIG["vocab_size"])
    stream = encode_stream(tokenizer, train_text, bpe_dropout=args.bpe_dropout)
    crops = Crops(stream, tokenizer.encode("\n").ids[0], args.device)

    val_ids = torch.tensor(tokenizer.encode(val_text).ids, device=args.device)
    val_rows = val_ids[: len(val_ids) // 512 * 512].view(-1, 512)
    chars_per_token = len(val_text) / len(val_ids)

    weights = init_weights(args.device)
    matrices = [weight for weight in weights.values() if weight.ndim == 2]
    vectors = [weight for weight in weights.values() if weight.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.99),
        fused=True,
    )
    print(
        f"{sum(weight.numel() for weight in weights.values()):,} weights; {len(stream):,} training tokens, "
        f"{val_rows.numel():,} validation tokens of {chars_per_token:.2f} characters",
        flush=True,
    )

    autocast = torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.device == "cuda")
    best, start = math.inf, time.perf_counter()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        inputs, targets = crops.batch(args.batch_size)
        with autocast:
            loss = mean_loss(forward(weights, inputs, args.dropout), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        if (step + 1) % EVAL_EVERY == 0 or step + 1 == args.steps:
            with torch.no_grad():
                val_loss = mean_loss(forward(weights, val_rows[:, :-1]), val_rows[:, 1:]).item()
            mark = ""
            if val_loss < best:
                best, mark = val_loss, " *"
                save_checkpoint(args.out, weights, tokenizer)
            print(
                f"step {step + 1:5}  train {loss.item():.4f}  val {val_loss:.4f}  "
                f"({val_loss / chars_per_token:.4f} nats/char)  {time.perf_counter() - start:.0f} s{mark}",
                flush=True,
            )

    print(f"best validation loss {best:.4f} nats/token", flush=True)
    weights = load_file(args.out / "model.safetensors", device=args.device)
    for prompt in ("", "ROMEO:\n", "To be, or not to be"):
        print(f"--- sample after {prompt!r}")
        print(sample(weights, tokenizer, prompt, max_tokens=250, temperature=0.8), flush=True)


# --- export -----------------------------------------------------------------------------------------------


def interleave_rotary_rows(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorder q_proj or k_proj rows from Hugging Face's order to that of GGUF's architecture "llama".

    Here rotary embedding pairs row i of a head with row i + head_dim / 2; GGUF, like Meta's checkpoints,
    pairs neighbours (2 i with 2 i + 1). llama.cpp's converter permutes the rows in the same way.
    """
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def gguf_name(name: str) -> str:
    """A tensor's GGUF name for its Hugging Face name."""
    renamed = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    stem = name.removesuffix(".weight")
    if stem in renamed:
        return renamed[stem] + ".weight"
    layer, part = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{renamed[part]}.weight"


def export(folder: Path, out: Path) -> None:
    """Turn a folder written by `train` into a GGUF file: matrices as Q8_0, norms as float32."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = load_file(folder / "model.safetensors")
    out.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_name("KuiperLLM demo")
    writer.add_description("Trained by tools/train_demo.py of KuiperLLM on Tiny Shakespeare (public domain)")
    writer.add_license("MIT")
    writer.add_languages(["en"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    add_tokenizer(writer, json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")))
    for name, weight in weights.items():
        if name.endswith("q_proj.weight"):
            weight = interleave_rotary_rows(weight, config["num_attention_heads"])
        elif name.endswith("k_proj.weight"):
            weight = interleave_rotary_rows(weight, config["num_key_value_heads"])
        kind = gguf.GGMLQuantizationType.Q8_0 if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(gguf_name(name), gguf.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(f"{out}: {out.stat().st_size:,} bytes")


def add_tokenizer(writer: Any, tokenizer: dict[str, Any]) -> None:
    """Store a parsed `tokenizer.json` of byte-level BPE under GGUF's `tokenizer.ggml.*` keys."""
    import gguf

    vocab = tokenizer["model"]["vocab"]
    special = {token["id"] for token in tokenizer["added_tokens"]}
    kinds = [gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in range(len(vocab))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(vocab, key=vocab.__getitem__))
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(BOS_ID)
    writer.add_eos_token_id(BOS_ID)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train KuiperLLM's demo model, or export it to GGUF.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--corpus", type=Path, help="train on this text file")
    source.add_argument("--export", type=Path, metavar="FOLDER", help="write the GGUF of this trained folder")
    parser.add_argument(
        "--out", type=Path, required=True, help="the folder to train to, or the GGUF to write"
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=64, help="crops of 512 tokens per step")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--dropout", type=float, default=0.3)
    parser.add_argument("--bpe-dropout", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=0.5)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.export:
        export(args.export, args.out)
    else:
        train(args)


if __name__ == "__main__":
    main()
