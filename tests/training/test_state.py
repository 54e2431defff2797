import dataclasses
import json

import pytest
import torch

from minidoctor.batching import ShuffledBatches, micro_batches
from minidoctor.checkpoints.adapters import ADAPTER
from minidoctor.checkpoints.hugging_face import load_model
from minidoctor.config import TARGETS, AdapterConfig, TrainConfig, UserError
from minidoctor.files.safetensors import read_header, read_tensors, write_tensors
from minidoctor.model import trainable_parameters
from minidoctor.step import make_optimizer, make_queue, train_step
from minidoctor.training.data import load_data
from minidoctor.training.groups import learn_groups
from minidoctor.training.state import STATE, Components, RunState, read_state, restore, save


def components(config, adapter):
    model = load_model(config.base, adapter=adapter)
    return Components(model, make_optimizer(model, config), make_queue(model, config))


def test_a_saved_run_has_all_fields_when_it_is_read(make_config, adapter, tmp_path):
    config = make_config(lr=0.1, data="痛风 \udce9.jsonl")
    state = RunState(config, adapter, 3, 0.5, 70, ((0.5, 0.5),), None, {"base": "b", "data": "d", "eval": ""}, "/x")
    (tmp_path / "run").mkdir()
    save(components(config, adapter), state)
    assert read_state(tmp_path / "run") == state


def test_restored_components_take_the_same_step(make_config, adapter, tokenizer, tmp_path):
    config = make_config()
    (tmp_path / "run").mkdir()
    batches = ShuffledBatches(load_data(config, tokenizer, 128).examples, 4, 0)
    original = components(config, adapter)
    state = RunState(config, adapter, input_hashes={"base": ""})

    def step(c, number):
        examples = next(batches.starting_at(number))
        return train_step(*c, micro_batches(examples, 1), number, config).losses["loss"].item()

    losses = []
    for state.step in range(3):
        save(original, state)
        torch.manual_seed(1)  # other initial values
        restored, other = components(config, adapter), components(config, adapter)
        restore(restored, state)
        other_loss = step(other, state.step)
        losses.append((step(original, state.step), step(restored, state.step)))
        parameters = (trainable_parameters(c.model) for c in (original, restored))
        assert all(torch.equal(a, b) for a, b in zip(*(p.values() for p in parameters), strict=True))
        assert torch.equal(original.queue.keys, restored.queue.keys)
        assert losses[-1][0] != other_loss or state.step == 0  # the first loss does not depend on the experts
    assert all(a == b for a, b in losses)


def test_the_state_contains_parameters_moments_and_queue(train_run):
    names = {name for name, _ in read_tensors(train_run(steps=1) / STATE)}
    router = "model.layers.0.mlp.router.scale"
    assert {router, f"optimizer.exp_avg.{router}", "queue.keys", "queue.written"} <= names


def test_a_missing_or_damaged_state_is_rejected(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        read_state(tmp_path)
    (tmp_path / STATE).write_bytes(b"\0" * 5)
    with pytest.raises(UserError, match=STATE):
        read_state(tmp_path)


def damaged(**changes):
    state = RunState(TrainConfig(), AdapterConfig(targets=tuple(TARGETS)), input_hashes={"base": ""})
    run = json.loads(json.dumps(dataclasses.asdict(state))) | changes
    return {"run": json.dumps({name: value for name, value in run.items() if value != "removed"})}


@pytest.mark.parametrize(
    "metadata",
    [{}, {"run": "{"}, {"run": "[]"}, {"run": "{}"}, damaged(step="removed"), damaged(step="3"),
     damaged(config={}), damaged(input_hashes=[]), damaged(unknown=1), damaged(adapter=None)],
    ids=str,
)  # fmt: skip
def test_a_state_with_an_invalid_record_is_rejected(tmp_path, metadata):
    write_tensors(tmp_path / STATE, {"a": torch.ones(2)}, metadata)
    with pytest.raises(UserError, match=STATE):
        read_state(tmp_path)


def test_the_record_of_the_test_above_is_valid_without_damage(tmp_path):
    write_tensors(tmp_path / STATE, {"a": torch.ones(2)}, damaged())
    assert read_state(tmp_path).step == 0


def test_a_state_with_another_shape_is_rejected(train_run, make_config, adapter):
    out = train_run(steps=1)
    state = read_state(out)
    tensors = dict(read_tensors(out / STATE))
    tensors["queue.keys"] = tensors["queue.keys"][:, :, :2]
    write_tensors(out / STATE, tensors, read_header(out / STATE)[1])
    with pytest.raises(UserError, match=r"queue\.keys"):
        restore(components(make_config(), adapter), state)


def test_the_record_of_a_run_without_groups_has_one_group(tmp_path):
    metadata = damaged()
    run = json.loads(metadata["run"])
    assert run["adapter"].pop("n_groups") == 2
    write_tensors(tmp_path / STATE, {"a": torch.ones(2)}, {"run": json.dumps(run)})
    assert read_state(tmp_path).adapter == AdapterConfig(targets=tuple(TARGETS), n_groups=1)


def test_groups_are_saved_and_restored(make_config, tokenizer, tmp_path):
    config, adapter = make_config(), AdapterConfig(n_experts=4, top_k=2, rank=2, n_groups=2)
    (tmp_path / "run").mkdir()
    original, state = components(config, adapter), RunState(config, adapter)
    learn_groups(original.model, load_data(config, tokenizer, 128).examples, 0)
    save(original, state)
    assert {"groups.centres", "groups.mean"} <= {name for name, _ in read_tensors(tmp_path / "run" / ADAPTER)}
    restored = components(config, adapter)
    assert not torch.equal(restored.model.groups.centres, original.model.groups.centres)
    restore(restored, state)
    assert torch.equal(restored.model.groups.centres, original.model.groups.centres)
    assert torch.equal(restored.model.groups.mean, original.model.groups.mean)
    assert original.model.groups.mean.any()
