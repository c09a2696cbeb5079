"""Models of the transformers package, with random weights, parallelized with DTensor plans.

With world.degree("tp") of 1 the model is left as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.utils import parametrize

from .harness import fill

VOCABULARY, LENGTH, BATCH = 37, 7, 2
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "max_position_embeddings": 16,
    "use_cache": False,
    "attn_implementation": "sdpa",
}


def train_step(world: Any, model: nn.Module) -> dict[str, Any]:
    """One optimizer step: loss, logits, gradients and new parameters."""
    model.train()
    forward = world.compile(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
    out = forward(input_ids=tokens, labels=tokens)
    out.loss.backward()
    results = {"loss": out.loss, "logits": out.logits}
    parameters = {  # without the names that parametrize puts between
        name.replace(".parametrizations.", ".").removesuffix(".original"): parameter
        for name, parameter in model.named_parameters()
    }
    results |= {f"grad {name}": parameter.grad for name, parameter in parameters.items()}
    optimizer.step()
    return results | {name: p.detach() for name, p in parameters.items()}


# ---- Llama
def attention_plan(prefix: str = "") -> dict[str, ParallelStyle]:
    plan: dict[str, ParallelStyle] = {f"{prefix}{n}_proj": ColwiseParallel() for n in "qkv"}
    return plan | {f"{prefix}o_proj": RowwiseParallel()}


EMBEDDINGS = {
    "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
    "lm_head": ColwiseParallel(output_layouts=Replicate()),
}


def llama(world: Any) -> dict[str, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = fill(LlamaForCausalLM(LlamaConfig(**SIZES)))
    tp = world.degree("tp")
    if tp > 1:
        mesh = world.mesh((tp,), ("tp",))
        uneven = ColwiseParallel(use_local_output=False)  # 50 columns
        parallelize_module(model, mesh, EMBEDDINGS)
        for layer in model.model.layers:
            mlp = {
                "mlp.gate_proj": uneven,
                "mlp.up_proj": uneven,
                "mlp.down_proj": RowwiseParallel(),
            }
            parallelize_module(layer, mesh, attention_plan("self_attn.") | mlp)
    return train_step(world, model)


# ---- GPT-2, whose linear layers are transformers' Conv1D: weight [in, out]
class Conv1DColwise(ParallelStyle):
    """Columns on ranks; with `heads` the output is this rank's part of q, k and v."""

    def __init__(self, heads: bool = False) -> None:
        super().__init__()
        self.heads = heads

    def _apply(self, module: nn.Module, mesh: Any) -> nn.Module:
        def partition(name: str, inner: nn.Module, mesh: Any) -> None:
            for key, parameter in list(inner.named_parameters(recurse=False)):
                placed = distribute_tensor(parameter, mesh, [Shard(parameter.ndim - 1)])
                inner.register_parameter(key, nn.Parameter(placed))

        def give(inner: nn.Module, inputs: Any, mesh: Any) -> Any:
            x = inputs[0]
            return x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, [Replicate()])

        def take(inner: nn.Module, out: DTensor, mesh: Any) -> Any:
            if not self.heads:
                return out
            whole = out.redistribute(placements=[Replicate()])
            local = whole.to_local(grad_placements=[Partial()])
            parts = local.unflatten(-1, (3, mesh.size(), -1))
            return parts[..., mesh.get_local_rank(), :].flatten(-2)

        return distribute_module(module, mesh, partition, give, take)


class Conv1DRowwise(ParallelStyle):
    """Rows on ranks; the output is summed over them."""

    def _apply(self, module: nn.Module, mesh: Any) -> nn.Module:
        def partition(name: str, inner: nn.Module, mesh: Any) -> None:
            placements = {"weight": [Shard(0)], "bias": [Replicate()]}
            for key, parameter in list(inner.named_parameters(recurse=False)):
                placed = distribute_tensor(parameter, mesh, placements[key])
                inner.register_parameter(key, nn.Parameter(placed))

        def give(inner: nn.Module, inputs: Any, mesh: Any) -> Any:
            x = inputs[0]
            return x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, [Shard(x.ndim - 1)])

        def take(inner: nn.Module, out: DTensor, mesh: Any) -> Any:
            return out.redistribute(placements=[Replicate()]).to_local()

        return distribute_module(module, mesh, partition, give, take)


def gpt2(world: Any) -> dict[str, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=48,
        n_head=12,
        n_layer=2,
        n_inner=50,
        n_positions=16,
        use_cache=False,
        attn_implementation="sdpa",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = fill(GPT2LMHeadModel(config))
    model.loss_type = "ForCausalLM"  # by default transformers warns, which Dynamo does not trace
    tp = world.degree("tp")
    if tp > 1:
        mesh = world.mesh((tp,), ("tp",))
        parallelize_module(
            model,
            mesh,
            {
                "transformer.wte": RowwiseParallel(input_layouts=Replicate()),
                "lm_head": ColwiseParallel(output_layouts=Replicate()),
            },
        )
        for block in model.transformer.h:
            plan = {
                "attn.c_attn": Conv1DColwise(heads=True),
                "attn.c_proj": Conv1DRowwise(),
                "mlp.c_fc": Conv1DColwise(),
                "mlp.c_proj": Conv1DRowwise(),
            }
            parallelize_module(block, mesh, plan)
            block.attn.split_size //= tp
    return train_step(world, model)


# ---- Mixtral: experts on ranks, tokens on all of them
class ToLocal(nn.Module):
    def forward(self, parameter: Tensor) -> Tensor:
        return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class Experts(ParallelStyle):
    """Each rank computes what its experts give to every token; the parts are summed."""

    def _apply(self, module: nn.Module, mesh: Any) -> nn.Module:
        own = module.num_experts // mesh.size()

        def give(inner: nn.Module, inputs: Any, mesh: Any) -> Any:
            hidden, index, weights = (
                DTensor.from_local(x, mesh, [Replicate()]).to_local(grad_placements=[Partial()])
                if x.is_floating_point()
                else x
                for x in inputs
            )
            local = index - mesh.get_local_rank() * own
            mine = (local >= 0) & (local < own)
            return hidden, torch.where(mine, local, own), torch.where(mine, weights, 0.0)

        def take(inner: nn.Module, out: Tensor, mesh: Any) -> Any:
            return (
                DTensor.from_local(out, mesh, [Partial()])
                .redistribute(placements=[Replicate()])
                .to_local()
            )

        def partition(name: str, inner: nn.Module, mesh: Any) -> None:
            for key, parameter in list(inner.named_parameters(recurse=False)):
                placed = nn.Parameter(distribute_tensor(parameter, mesh, [Shard(0)]))
                inner.register_parameter(key, placed)

        distribute_module(module, mesh, partition, give, take)
        for key in ("gate_up_proj", "down_proj"):
            parametrize.register_parametrization(module, key, ToLocal(), unsafe=True)
        module.num_experts = own
        module._is_expert_parallel = True
        return module


def mixtral(world: Any) -> dict[str, Any]:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        **SIZES, num_local_experts=12, num_experts_per_tok=2, experts_implementation="batched_mm"
    )
    model = fill(MixtralForCausalLM(config))
    tp = world.degree("tp")
    if tp > 1:
        mesh = world.mesh((tp,), ("tp",))
        parallelize_module(model, mesh, EMBEDDINGS)
        for layer in model.model.layers:
            parallelize_module(layer, mesh, attention_plan("self_attn."))
            parallelize_module(layer.mlp, mesh, {"experts": Experts()})
    return train_step(world, model)
