"""Rotary embedding against a direct formula in float64, complex multiplication, and the published YaRN numbers."""

import math

import pytest
import torch
from testing import assert_close
from tiny import tiny_config

from hf_moe.models.configuration_deepseek_v2 import DeepseekV2Config
from hf_moe.models.configuration_deepseek_v3 import DeepseekV3Config
from hf_moe.models.configuration_kimi_k2 import KimiK2Config
from hf_moe.models.layer_mla import LatentAttention
from hf_moe.models.layer_rope import RotaryEmbedding, rotate_halves, rotate_interleaved, yarn_softmax_gain

YARN = {"type": "yarn", "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096}
V3 = {**YARN, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0}
V2 = {**YARN, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707}
K2 = {**YARN, "beta_fast": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
# Configuration, theta, RoPE dictionary, then what the public reference code gives: low and high end of the ramp,
# g(mscale_all_dim) and the softmax scale.
PUBLISHED = [
    pytest.param(DeepseekV3Config, 10000, V3, 10, 23, 1.36889, 0.135234, id="deepseek_v3"),
    pytest.param(
        DeepseekV2Config, 10000, {**V2, "mscale": 1.0, "mscale_all_dim": 1.0}, 10, 23, 1.36889, 0.135234, id="v2.5"
    ),
    pytest.param(DeepseekV2Config, 10000, V2, 10, 23, 1.26080, 0.114721, id="deepseek_v2"),
    pytest.param(KimiK2Config, 50000.0, {**K2, "factor": 32.0}, 19, 20, 1.34657, 0.130861, id="kimi_k2_factor32"),
    pytest.param(KimiK2Config, 50000.0, {**K2, "factor": 64.0}, 19, 20, 1.41589, 0.144679, id="kimi_k2_factor64"),
]


def direct_inverse_frequencies(rope: dict, theta: float, width: int) -> list[float]:
    """The formula of the YaRN paper (arXiv 2309.00071), one frequency at a time."""
    plain = [theta ** (-2 * j / width) for j in range(width // 2)]
    if rope is None:
        return plain

    def correction(turns):
        return (
            width * math.log(rope["original_max_position_embeddings"] / (2 * math.pi * turns)) / (2 * math.log(theta))
        )

    low = max(math.floor(correction(rope["beta_fast"])), 0)
    high = min(math.ceil(correction(rope["beta_slow"])), width - 1)
    if low == high:
        high += 0.001
    ramp = [min(max((j - low) / (high - low), 0.0), 1.0) for j in range(width // 2)]
    return [f / rope["factor"] * r + f * (1 - r) for f, r in zip(plain, ramp)]


@pytest.mark.parametrize("config_class, theta, rope, low, high, gain, scale", PUBLISHED)
def test_published_yarn_numbers(config_class, theta, rope, low, high, gain, scale):
    config = config_class(rope_theta=theta, rope_scaling=rope)
    assert config.qk_rope_head_dim == 64 and config.qk_head_dim == 192
    embedding = RotaryEmbedding(config)
    plain = torch.tensor([theta ** (-2 * j / 64) for j in range(32)], dtype=torch.float64)
    ratio = embedding.inv_freq.double() / plain
    # Up to `low` the frequencies are plain, from `high` on they are divided by the factor, and between they are mixed.
    assert_close("frequencies before the ramp", ratio[: low + 1], torch.ones(low + 1), "float32")
    assert_close("frequencies after the ramp", ratio[high:], torch.full((32 - high,), 1 / rope["factor"]), "float32")
    between = ratio[low + 1 : high]
    assert bool(((between < 1) & (between > 1 / rope["factor"])).all())
    assert math.sqrt(yarn_softmax_gain(config.rope_parameters)) == pytest.approx(gain, abs=5e-6)
    with torch.device("meta"):
        attention = LatentAttention(config, layer_idx=0)
    assert attention.scaling == pytest.approx(scale, abs=1e-6)
    assert embedding.attention_scaling == pytest.approx(1.0)  # mscale equals mscale_all_dim in every public file


@pytest.mark.parametrize("rope", [None, V3, V2, {**K2, "factor": 32.0}], ids=["plain", "v3", "v2", "k2"])
def test_angles_against_the_formula(rope):
    config = DeepseekV3Config(rope_theta=10000.0, rope_scaling=rope)
    positions = torch.tensor([[0, 1, 2, 63, 4095, 4096, 20000], [5, 4, 3, 2, 1, 0, 163839]])
    # float64 angles of float32 frequencies: what float32 positions times frequencies round to.
    inverse = torch.tensor(direct_inverse_frequencies(rope, 10000.0, 64), dtype=torch.float64)
    embedding = RotaryEmbedding(config)
    assert_close("inverse frequencies", embedding.inv_freq, inverse, "float32")
    cos, sin = embedding(torch.zeros(2, 7, 8), positions)
    assert cos.shape == sin.shape == (2, 7, 32) and cos.dtype == torch.float32
    near = positions < 100
    angles = positions.double().unsqueeze(-1) * inverse
    assert_close("cos", cos[near], angles.cos()[near], "float32")
    assert_close("sin", sin[near], angles.sin()[near], "float32")
    # Far out a float32 angle has few digits behind the point. The same rounding, then cosine in float64:
    rounded = (positions.float().unsqueeze(-1) * embedding.inv_freq).double()
    assert_close("cos of rounded angles", cos, rounded.cos(), "float32")
    assert_close("sin of rounded angles", sin, rounded.sin(), "float32")


@pytest.mark.parametrize(
    ("given", "numerator", "denominator"),
    [
        ({"mscale": 1.0, "mscale_all_dim": 0.5}, 1.0, 0.5),
        ({"mscale": 0.707}, 0.707, 0.0),
        ({"mscale_all_dim": 0.5}, 1.0, 0.5),
        ({"mscale": 0.707, "mscale_all_dim": 0}, 0.707, 0.0),
        ({}, 1.0, 0.0),
    ],
)
def test_unequal_mscale_scales_cos_and_sin(given, numerator, denominator):
    """g(mscale) / g(mscale_all_dim) is in both tables, with 1 and 0 where upstream files lack the keys."""
    config = DeepseekV3Config(rope_theta=10000, rope_scaling={**YARN, "factor": 40, **given})
    cos, sin = RotaryEmbedding(config)(torch.zeros(1, 1, 1), torch.tensor([[7]]))
    expected = (0.1 * numerator * math.log(40) + 1) / (0.1 * denominator * math.log(40) + 1)
    assert_close("radius", (cos**2 + sin**2).sqrt(), torch.full((1, 1, 32), expected), "float32")


@pytest.mark.parametrize("rope", [None, V3], ids=["plain", "v3"])
@pytest.mark.parametrize("cast", [lambda module: module.to(torch.bfloat16), torch.nn.Module.half])
def test_low_precision_model_has_float32_angles(rope, cast):
    """bfloat16 holds neither position 4097 nor the frequencies: angles are in float32, and only the tables are rounded,
    whether the model was made in that dtype or cast to it."""
    config = DeepseekV3Config(rope_theta=10000.0, rope_scaling=rope)
    positions = torch.tensor([[3, 1000, 4097]])
    exact = RotaryEmbedding(config)(torch.zeros(1, 1, 1), positions)
    for embedding in (RotaryEmbedding(config), cast(torch.nn.Sequential(RotaryEmbedding(config)))[0]):
        for dtype in (torch.bfloat16, torch.float16):
            tables = embedding(torch.zeros(1, 1, 1, dtype=dtype), positions)
            for table, expected in zip(tables, exact):
                assert table.dtype == dtype and torch.equal(table, expected.to(dtype))


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("width", [2, 4, 64])
def test_interleaved_rotation_is_complex_multiplication(width, heads):
    states = torch.randn(2, 5, heads, width, dtype=torch.float64)
    angles = torch.randn(2, 5, width // 2, dtype=torch.float64) * 10
    turned = torch.view_as_complex(states.unflatten(-1, (-1, 2))) * torch.polar(
        torch.ones_like(angles), angles
    ).unsqueeze(2)
    expected = torch.view_as_real(turned).flatten(-2)
    assert_close("rotated", rotate_interleaved(states, angles.cos(), angles.sin()), expected, "float64")


def test_half_split_rotation_is_the_same_on_permuted_dimensions():
    states, angles = torch.randn(2, 5, 3, 8, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
    pairs = torch.arange(8).view(4, 2).t().flatten()  # 0 2 4 6 1 3 5 7
    halves = rotate_halves(states[..., pairs], angles.cos(), angles.sin())
    assert_close("rotated", halves, rotate_interleaved(states, angles.cos(), angles.sin())[..., pairs], "float64")


def test_scores_depend_on_distance_only():
    config = tiny_config(rope_scaling=None)
    query, key = torch.randn(1, 1, 1, 4), torch.randn(1, 1, 1, 4)

    def score(query_position, key_position):
        tables = [RotaryEmbedding(config)(query, torch.tensor([[p]])) for p in (query_position, key_position)]
        return (rotate_interleaved(query, *tables[0]) * rotate_interleaved(key, *tables[1])).sum()

    assert score(9, 4).item() == pytest.approx(score(45, 40).item(), abs=1e-5)
    assert score(9, 4).item() != pytest.approx(score(9, 8).item(), abs=1e-3)


def test_dynamic_rope_follows_the_length_and_comes_back():
    """Dynamic NTK stretches theta beyond the original length: theta * (f L / L0 - (f - 1)) ** (d / (d - 2))."""
    rope = {"type": "dynamic", "factor": 2.0}
    config = tiny_config(rope_scaling=rope, rope_theta=10000.0, max_position_embeddings=32, qk_rope_head_dim=8)
    embedding = RotaryEmbedding(config)
    tables = {}
    for length in (16, 80, 16):
        tables[length] = embedding(torch.zeros(1, 1, 1), torch.arange(length).unsqueeze(0))
        stretch = max(2.0 * length / 32 - 1.0, 1.0) if length > 32 else 1.0
        theta = 10000.0 * stretch ** (8 / 6)
        angles = torch.arange(length).double().unsqueeze(-1) * theta ** (-torch.arange(0, 8, 2).double() / 8)
        assert_close(f"cos at {length}", tables[length][0][0], angles.cos(), "float32")
        assert_close(f"sin at {length}", tables[length][1][0], angles.sin(), "float32")


def test_linear_rope_divides_positions():
    config = tiny_config(rope_scaling={"type": "linear", "factor": 4.0}, rope_theta=10000.0)
    cos, _ = RotaryEmbedding(config)(torch.zeros(1, 1, 1), torch.tensor([[40]]))
    angles = 10.0 * 10000.0 ** (-torch.arange(0, 4, 2).double() / 4)
    assert_close("cos", cos[0, 0], angles.cos(), "float32")


def test_llama3_rope_stretches_long_waves_only():
    """Waves beyond L0 / low are slowed by the factor, those below L0 / high are kept, those between are mixed."""
    rope = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 1024
    config = tiny_config(rope_scaling=rope, rope_theta=10000.0, qk_rope_head_dim=8)
    cos, sin = RotaryEmbedding(config)(torch.zeros(1, 1, 1), torch.tensor([[40]]))
    # theta ** (-2 j / 8) has waves of 6.3, 62.8, 628 and 6283 positions; 1024 / 628.3 lies between the two factors.
    kept = (1024 / (2 * math.pi * 100.0) - 1.0) / 3.0
    frequencies = [1.0, 0.1, 0.01 * (kept + (1.0 - kept) / 8.0), 0.001 / 8.0]
    angles = 40.0 * torch.tensor(frequencies, dtype=torch.float64)
    assert_close("cos", cos[0, 0], angles.cos(), "float32")
    assert_close("sin", sin[0, 0], angles.sin(), "float32")
