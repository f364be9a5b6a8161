"""Adapters of the HF-native layout against the real peft and transformers: logits, both ways."""

import jax.numpy as jnp
import numpy as np
import pytest

from convert import export_folder, load_checkpoint, open_folder
from convert.adapters.adapter import Adapter, load_adapter, save_adapter
from tests.convert.adapters.test_adapter_layouts import merged_params, native_deltas, run
from tests.convert.writing.test_to_pytorch import random_lora
from tests.support.checkpoints import random_params, save, tiny_config
from tests.support.peft_oracle import oracle_of
from tests.support.toy import jit_forward

torch = pytest.importorskip("torch", reason="the PyTorch reference is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="the PEFT library is not installed")

# peft asks transformers for what it has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

TOLERANCE = 2e-4
CONFIG = tiny_config(ffn_hidden_size=51)
TOKENS = np.random.default_rng(3).integers(3, 400, (2, 10))
NATIVE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "own"
    save(folder, random_params(CONFIG), CONFIG)
    return folder


@pytest.fixture(scope="module")
def native(base):
    """The base in the HF-native layout."""
    folder = base.parent / "glm"
    export_folder(open_folder(base), folder, layout="glm")
    return folder


def opened(folder):
    """The folder as transformers opens it."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def model(native):
    """Opened each time: peft changes the model that it wraps."""
    return opened(native)


def theirs(model):
    with torch.no_grad():
        out = model(torch.tensor(TOKENS))
    return getattr(out, "logits", out).numpy()


def ours(base, lora=None):
    params = load_checkpoint(base, dtype="float32").params
    return np.asarray(jit_forward(CONFIG, params, jnp.asarray(TOKENS, jnp.int32), lora=lora)[0])


def merged(base, lora):
    """Our logits with an adapter that is added to the weights: one program for all ranks."""
    params = merged_params(load_checkpoint(base, dtype="float32").params, lora)
    return np.asarray(jit_forward(CONFIG, params, jnp.asarray(TOKENS, jnp.int32))[0])


def trained(model, **settings):
    """An adapter that peft has trained for two steps."""
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    wrapped = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW((x for x in wrapped.parameters() if x.requires_grad), lr=0.05)
    tokens = torch.tensor(TOKENS)
    for _ in range(2):
        wrapped(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return wrapped.eval()


def test_peft_takes_ours_on_the_exported_folder(tmp_path, base, model):
    lora = random_lora(CONFIG, 4, size=0.1)
    save_adapter(tmp_path / "lora", Adapter(lora))
    assert run(tmp_path / "lora", tmp_path / "glm", "--layout", "glm", "--base", base) == 0
    wrapped = peft.PeftModel.from_pretrained(model, str(tmp_path / "glm")).eval()
    found, expected = theirs(wrapped), ours(base, lora)
    assert np.abs(found - expected).max() <= TOLERANCE
    assert np.abs(expected - ours(base)).max() > 100 * TOLERANCE
    adapted = [name for name, _ in wrapped.named_parameters() if "lora_A" in name]
    assert len(adapted) == len(NATIVE) * CONFIG.num_layers


@pytest.mark.parametrize(
    ("settings", "rank"),
    [
        ({"target_modules": "all-linear", "r": 3, "lora_alpha": 5, "use_rslora": True}, 9),
        (
            {
                "target_modules": ["q_proj", "k_proj", "down_proj"], "r": 4,
                "rank_pattern": {"layers.1.self_attn.q_proj": 2, "k_proj": 1},
                "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 20, "down_proj": 3},
            },
            5,
        ),
    ],
    ids=["rslora", "patterns"],
)  # fmt: skip
def test_we_take_what_peft_trained_there(tmp_path, base, model, settings, rank):
    wrapped = trained(model, **settings)
    expected = theirs(wrapped)
    assert np.abs(expected - ours(base)).max() > 100 * TOLERANCE
    wrapped.save_pretrained(str(tmp_path / "peft"))
    adapter = load_adapter(tmp_path / "peft", CONFIG)
    assert adapter.rank("query_key_value") == rank
    assert np.abs(merged(base, adapter.lora) - expected).max() <= TOLERANCE


def test_from_peft_to_the_official_layout_and_back(tmp_path, base, native, model):
    wrapped = trained(model, target_modules=NATIVE, r=2, lora_alpha=6)
    expected = theirs(wrapped)
    wrapped.save_pretrained(str(tmp_path / "peft"))
    command = (tmp_path / "peft", tmp_path / "fused", "--layout", "chatglm", "--base", native)
    assert run(*command) == 0
    lora = load_adapter(tmp_path / "fused", CONFIG).lora
    assert np.abs(merged(base, lora) - expected).max() <= TOLERANCE
    _, _, official = oracle_of(CONFIG, random_params(CONFIG))
    fused = peft.PeftModel.from_pretrained(official, str(tmp_path / "fused")).eval()
    assert np.abs(theirs(fused) - expected).max() <= TOLERANCE
    command = (tmp_path / "fused", tmp_path / "back", "--layout", "glm", "--base", native)
    assert run(*command) == 0
    one, other = native_deltas(tmp_path / "peft", CONFIG), native_deltas(tmp_path / "back", CONFIG)
    assert one.keys() == other.keys()
    for module in one:
        np.testing.assert_array_equal(one[module], other[module])


def test_an_adapter_of_theirs_is_merged_into_an_export(tmp_path, base, model):
    wrapped = trained(model, target_modules=["q_proj", "o_proj"], r=2)
    wrapped.save_pretrained(str(tmp_path / "peft"), safe_serialization=False)  # a .bin
    lora = load_adapter(tmp_path / "peft", CONFIG).lora
    export_folder(open_folder(base), tmp_path / "glm", layout="glm", lora=lora)
    assert np.abs(theirs(opened(tmp_path / "glm")) - theirs(wrapped)).max() <= TOLERANCE
