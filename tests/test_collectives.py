"""Collectives read from a program's text: every spelling of HLO that matters, and a real step on simulated devices."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import relative

from instaflow_jax.infra.collectives import OPERATIONS, Collective, read, sent_by_operation, unexpected

PROGRAM = """HloModule jit_update, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (carry: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %carry = (s32[], f32[8,4]{1,0}) parameter(0)
  %part = f32[8,4]{1,0} get-tuple-element(%carry), index=1
  %full = bf16[32,4]{1,0} all-gather(%part), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}, use_global_device_ids=true
  ROOT %next = (s32[], f32[8,4]{1,0}) tuple(%carry, %part)
}

%condition (carry: (s32[], f32[8,4])) -> pred[] {
  %carry = (s32[], f32[8,4]{1,0}) parameter(0)
  ROOT %more = pred[] constant(true)
}

%all-reduce-scatter.1 (whole: f32[8,4]) -> (f32[8,1]) {
  %whole = f32[8,4]{1,0} parameter(0)
  %summed = f32[8,4]{1,0} all-reduce(%whole), channel_id=7, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %kept = f32[8,1]{1,0} dynamic-slice(%summed), dynamic_slice_sizes={8,1}
  ROOT %shards = (f32[8,1]{1,0}) tuple(%kept)
}

ENTRY %main (p: f32[8,4]) -> f32[] {
  %p = f32[8,4]{1,0} parameter(0), sharding={devices=[4,2]<=[8]}
  %start = (s32[], f32[8,4]{1,0}) tuple(%p)
  %loop = (s32[], f32[8,4]{1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %grads = (f32[16]{0}, f32[]) all-reduce(%p, %p), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %begun = (f32[8,4]{1,0}, f32[16,4]{1,0}) all-gather-start(%p), channel_id=3, replica_groups=mesh['x'=4,'y'=2] {'y'}, dimensions={0}
  %done = f32[16,4]{1,0} all-gather-done(%begun)
  %again = f32[16,4]{1,0} all-gather(%p), channel_id=3, replica_groups=mesh['x'=4,'y'=2] {'y'}, dimensions={0}
  %piece = f32[1,4]{1,0} reduce-scatter(%p), channel_id=4, replica_groups=mesh['x'=8] {'x':(2)4}, dimensions={0}, to_apply=%add
  %sent = ((f32[8,4]{1,0}, f32[16]{0}), (f32[1,4]{1,0}, f32[2]{0})) reduce-scatter-start(%p, %p), channel_id=8, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %fused = (f32[8,1]{1,0:T(8,128)S(1)}) fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1, metadata={op_name="grad"}
  %moved = (u8[8]{0}, u8[8]{0}) all-to-all(%p, %p), channel_id=5, replica_groups={{0,1},{2,3}}
  %shifted = s32[5]{0} collective-permute(%p), channel_id=6, source_target_pairs={{0,1},{1,0}}
  ROOT %out = f32[] get-tuple-element(%grads), index=1, metadata={op_name="all-gather(of nothing)"}
}
"""


def test_every_spelling_is_read():
    assert sorted(read(PROGRAM), key=lambda c: (c.operation, c.shape)) == [
        Collective("all-gather", "f32", (16, 4), 2, 1),
        Collective("all-gather", "bf16", (32, 4), 4, 3),
        Collective("all-reduce", "f32", (), 8, 1),
        Collective("all-reduce", "f32", (16,), 8, 1),
        Collective("all-to-all", "u8", (8,), 2, 1),
        Collective("all-to-all", "u8", (8,), 2, 1),
        Collective("collective-permute", "s32", (5,), 2, 1),
        Collective("reduce-scatter", "f32", (1, 4), 4, 1),
        Collective("reduce-scatter", "f32", (1, 4), 8, 1),
        Collective("reduce-scatter", "f32", (2,), 8, 1),
        Collective("reduce-scatter", "f32", (8, 1), 4, 1),  # the TPU's fusion
    ]


def test_bytes_of_each_operation():
    assert sent_by_operation(read(PROGRAM)) == {
        "all-reduce": 2 * 7 / 8 * (64 + 4),
        "all-gather": 3 * 3 / 4 * 256 + 1 / 2 * 256,
        "reduce-scatter": 3 * 16 + 3 * 32 + 7 * (16 + 8),
        "all-to-all": 2 * 1 / 2 * 8,
        "collective-permute": 20,
    }


def test_a_loop_whose_length_is_not_stated_counts_up_to_a_constant():
    """As the TPU's compiler writes it."""
    counted = PROGRAM.replace('backend_config={"known_trip_count":{"n":"3"}}', "metadata={}").replace(
        "  ROOT %more = pred[] constant(true)",
        "  %limit = s32[]{:T(128)} constant(3)\n"
        "  %i = s32[]{:T(128)} get-tuple-element(%carry), index=0\n"
        "  ROOT %more = pred[]{:T(512)} compare(%i, %limit), direction=LT",
    )
    assert counted.count("known_trip_count") == 0 and read(counted) == read(PROGRAM)


def test_a_collective_in_a_loop_of_unknown_length_is_refused():
    with pytest.raises(ValueError, match="a loop with all-gather has an unknown trip count"):
        read(PROGRAM.replace('"known_trip_count"', '"unknown"'))


def test_only_parameters_may_be_gathered_and_twice_per_sum():
    def gather(shape, times):
        return Collective("all-gather", "f32", shape, 8, times)

    kernels = [(3, 3, 64, 128), (1, 1, 64, 64)]
    fine = [gather((128, 3, 3, 64), 4), gather((64, 64), 2), Collective("all-reduce", "f32", (64, 64, 64, 320), 8, 2)]
    assert not unexpected(fine, kernels, sums=2)
    assert unexpected([*fine, gather((3, 3, 64, 128), 1)], kernels, sums=2) == [
        "1 × all-gather of f32[3, 3, 64, 128] among 8"
    ]
    assert unexpected([gather((64, 64, 64, 320), 1)], kernels, sums=2)
    assert unexpected([gather((64, 64), 1)], [], sums=1)  # data parallelism gathers nothing
    assert not unexpected([Collective("all-reduce", "f32", (320,), 8, 9)], kernels, sums=2)  # a metric of a micro-batch
    for operation in ("all-reduce", "reduce-scatter"):
        assert unexpected([Collective(operation, "f32", (3, 3, 64, 128), 8, 9)], kernels, sums=2) == [
            f"9 × {operation} of f32[3, 3, 64, 128] among 8"
        ]
    for operation in OPERATIONS[3:]:
        assert unexpected([Collective(operation, "f32", (64, 64), 8, 1)], kernels, sums=2)


SCRIPT = """
import json, sys
import jax
import toy_training as toy
from instaflow_jax.infra import collectives, devices
from instaflow_jax.train import loop, step

def advance(fsdp, accumulate, loss=toy.quiet_loss, cast=devices.keep):
    mesh = devices.make_mesh(fsdp=fsdp)
    update = step.make_train_step(loss, toy.optimizer(), mesh, ema_decay=0.9, accumulate=accumulate, cast=cast)
    now, frozen = toy.new_state(mesh), devices.replicate(toy.frozen(), mesh)
    batch, key = devices.global_batch(next(toy.source()), mesh), devices.replicate_key(jax.random.key(1), mesh)
    compiled = loop.trace_step(update, now, frozen, batch, key, mesh).lower().compile()
    sharded = [p.shape for p in now.params.values() if not p.sharding.is_fully_replicated]
    sent = collectives.read(compiled.as_text())
    found = {"sent": collectives.sent_by_operation(sent), "unexpected": collectives.unexpected(sent, sharded, sums=1)}
    return found | {"norm": float(compiled(now, frozen, batch, key)[1]["grad_norm"]), "sharded": sharded}

found = [advance(1, 1), advance(8, 1), advance(4, 2)]
low = [advance(1, 1, toy.low_loss), *(advance(8, n, toy.low_loss, toy.low) for n in (1, 2))]
devices.gathers_once = lambda *_: False
print(json.dumps({"steps": [*found, advance(4, 2)], "low": low}))
"""

LOSSES = """
import json, types
import jax, jax.numpy as jnp
from helpers import normal
from instaflow_jax import sampling
from instaflow_jax.infra import collectives, devices
from instaflow_jax.stages import progressive
from instaflow_jax.train import losses, score_distillation

def network(params, Z, tau, text):
    return jnp.tanh(Z @ params["mix"] + (tau / 1000)[:, None, None, None] + text.mean((1, 2))[:, None, None, None])

net = types.SimpleNamespace(apply=network)
text = types.SimpleNamespace(apply=lambda params, ids: types.SimpleNamespace(last_hidden_state=params[ids]))
flow = sampling.Flow(1, 1000)
teacher = progressive.make_grid(flow, 4), progressive.make_bind(flow, 3.0)
fields = {"prompt_dropout": 0.0, "num_timesteps": 1000}
method = score_distillation.Method(
    net, net, text, None, score_distillation.flow_convention(1000), alpha=2.0, steps=(1, 2), t=(0.1, 0.9),
    unroll=False, **fields)
made = {
    "progressive": losses.make_progressive_loss(net, text, *teacher[::-1], **fields),
    "distill": losses.make_distill_loss(net, text, losses.make_latent_distance("squared"), match=0.25, penalty="squared",
                                        **fields),
    "refine": score_distillation.make_student_loss(method, matching=1, regression=0.25, adversarial=0),
}
weights = [{"mix": normal(i, 4, 4)} for i in range(2)]
frozen = {"text_encoder": normal(2, 16, 8), "null_ids": jnp.zeros((1, 3), int)}
frozen |= dict(zip(("teacher", "real", "fake"), (weights[1], *weights)))
batch = {"X0": normal(3, 64, 8, 8, 4), "X1": normal(4, 64, 8, 8, 4), "ids": jnp.arange(192).reshape(64, 3) % 16}

def compute(loss, count):
    mesh = devices.make_mesh(fsdp=1, devices=jax.devices()[:count])
    inputs = devices.replicate((weights[0], frozen), mesh)
    inputs += devices.global_batch(batch, mesh), devices.replicate_key(jax.random.key(1), mesh)
    step = jax.jit(jax.grad(loss, has_aux=True), out_shardings=devices.replicated(mesh)).lower(*inputs)
    step = step.compile({"xla_backend_optimization_level": 0})
    return collectives.unexpected(collectives.read(step.as_text()), [], sums=1), step(*inputs)[0]["mix"].tolist()

print(json.dumps({name: [compute(loss, count) for count in (8, 1)] for name, loss in made.items()}))
"""


@pytest.fixture(scope="module")
def toy_steps():
    """The toy step on 8 devices. "steps": data-parallel, FSDP 8, and FSDP 2 × 4 in two micro-batches, once gathering
    outside of their loop. "low", with kernels in bfloat16: data-parallel, and FSDP 8 in one and two micro-batches."""
    return on_eight_devices(SCRIPT)


@pytest.fixture
def steps(toy_steps):
    return toy_steps["steps"]


def on_eight_devices(script):
    """What the script prints last, as JSON."""
    here = Path(__file__).parent
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": f"{here}:{here.parent}"}
    done = subprocess.run([sys.executable, "-c", script], env=env, cwd=here.parent, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_no_sample_of_a_loss_moves_between_devices():
    """Guided teachers and shares of a batch, which double and cut it."""
    found = on_eight_devices(LOSSES)
    assert set(found) == {"progressive", "distill", "refine"}
    for name, ((moved, gradient), (_, alone)) in found.items():
        assert not moved, name
        assert relative(gradient, np.asarray(alone)) < 1e-5, name


@pytest.mark.slow
def test_sharded_steps_send_what_their_shapes_say(steps):
    parameters, kernels = 4 * (2 * 128 * 256 + 256), 4 * 2 * 128 * 256
    data_parallel, fsdp, cut, cut_inside = (step["sent"] for step in steps)
    assert data_parallel["all-reduce"] == pytest.approx(2 * 7 / 8 * parameters, rel=1e-2)  # and a few scalars
    assert data_parallel["all-gather"] == 0
    assert 4 * sum(map(math.prod, steps[1]["sharded"])) == kernels
    assert fsdp["all-gather"] == pytest.approx(7 / 8 * kernels)
    assert cut["all-gather"] in (
        pytest.approx(3 / 4 * kernels),
        pytest.approx(2 * 3 / 4 * kernels),
    )  # outside the loop, or inside
    assert cut_inside == cut  # XLA:CPU makes one program of both


@pytest.mark.slow
def test_sharded_steps_send_nothing_else_and_agree(steps):
    assert [step["unexpected"] for step in steps[:2]] == [[], []]
    left = sorted(steps[2]["unexpected"])  # by XLA:CPU, in the loop; the compilers of GPUs and TPUs move sums out of it
    assert left == [f"2 × all-reduce of f32[{shape}] among 8" for shape in ("128, 256", "256, 128")]
    assert [step["norm"] for step in steps] == pytest.approx([steps[0]["norm"]] * 4, rel=1e-5)


@pytest.mark.slow
def test_parameters_that_are_sent_in_bfloat16_give_the_same_step(toy_steps):
    alone, *sharded = (step["norm"] for step in toy_steps["low"])
    assert sharded == pytest.approx([alone] * 2, rel=1e-4)  # a sum of two micro-batches is rounded before it is sent
    assert alone != pytest.approx(toy_steps["steps"][0]["norm"], rel=1e-6)
