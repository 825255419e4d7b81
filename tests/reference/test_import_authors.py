"""An imported checkpoint of the authors' program has the same weights as the reference case."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from authors import Case, load_case, model_of
from safetensors.torch import save_file

from mor_megatron.huggingface.export import to_model
from mor_megatron.huggingface.importing import read_authors
from mor_megatron.model.stored_names import stored_name

CASES = [
    "mor_expert_cycle_nr2",
    "mor_expert_nr3_aux_router",
    "mor_expert_nr3_mlp",
    "mor_token_nr3_loss_free_sigmoid",
    "recursive_middle_cycle_nr3_kvshare",
    "recursive_sequence_nr2",
]


def write(case: Case, directory: Path) -> Path:
    """config.json, weights and the run's YAML; the YAML's path."""
    dims = case.meta["dims"]
    config = {
        "model_type": "llama",
        "vocab_size": dims["V"],
        "hidden_size": dims["H"],
        "intermediate_size": dims["FF"],
        "num_hidden_layers": dims["L_effective"],
        "num_attention_heads": dims["NH"],
        "num_key_value_heads": dims["NKV"],
        "max_position_embeddings": dims["S"],
        "rms_norm_eps": dims["eps"],
        "rope_theta": dims["theta"],
        "tie_word_embeddings": case.meta["tied_head"],
    }
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {n.removeprefix("param."): t.contiguous() for n, t in case.tensors.items() if n.startswith("param.")}
    save_file(tensors, directory / "model.safetensors")
    settings = directory / "run.yaml"
    settings.write_text(yaml.safe_dump({name: case.meta[name] for name in ("recursive", "kv_sharing", "mor")}))
    return settings


@pytest.mark.parametrize("name", CASES)
def test_authors_checkpoint(name: str, request, tmp_path: Path, process_group):
    case = load_case(Path(request.config.getoption("--reference-dir")) / f"{name}.safetensors")
    settings = write(case, tmp_path / "model")
    weights, config = read_authors(tmp_path / "model", settings)
    state = model_of(case).state_dict()
    state = {stored_name(key, state): tensor for key, tensor in state.items()}
    assert weights
    for key, tensor in weights.items():
        assert torch.equal(tensor, state[key].float().cpu()), key
    assert set(weights) == {key for key in state if not key.endswith("_extra_state")}
    model = to_model(weights, config)
    logits = model(case["input_ids"].long(), selection="capacity").logits
    torch.testing.assert_close(logits, case["train.logits"], atol=1e-5, rtol=0)


def test_untied_attention_is_refused(request, tmp_path: Path, process_group):
    """The release builds a new attention for every recursion of expert-choice."""
    case = load_case(Path(request.config.getoption("--reference-dir")) / "mor_expert_nr3.safetensors")
    first = "param.model.layers.1.block.0.self_attn.q_proj.weight"
    case.tensors[first.replace("layers.1.", "layers.2.")] = case.tensors[first] + 1
    settings = write(case, tmp_path / "model")
    with pytest.raises(ValueError, match=r"layers\.2\.block\.0\.self_attn\.q_proj\.weight differs"):
        read_authors(tmp_path / "model", settings)
