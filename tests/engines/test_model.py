"""What `LanguageModel` promises: exact hidden states, a proven head, untouched parameters, and clear refusals."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from opdkit.engines.load import pick_device
from opdkit.engines.model import LanguageModel
from opdkit.errors import UserError

Make = Callable[..., tuple[Any, Any]]
Rows = tuple[list[list[int]], list[list[int]]]
ARCHITECTURES = ["cohere", "gemma2", "gemma3", "gpt2", "granite", "llama", "qwen3", "qwen3_moe"]


def reference(module: Any, contexts: list[list[int]], answers: list[list[int]]) -> Tensor:
    """Last hidden states of each row alone, unpadded, from the module's own output, at the predicting positions."""
    picked = []
    for context, answer in zip(contexts, answers, strict=True):
        states = module(input_ids=torch.tensor([context + answer]), output_hidden_states=True).hidden_states[-1][0]
        picked.append(states[len(context) - 1 : len(context) + len(answer) - 1])
    return torch.cat(picked)


def logits(model: LanguageModel, hidden_NH: Tensor) -> Tensor:
    head = model.head().trimmed(hidden_NH.dtype)
    return head.logits(head.project(hidden_NH), temperature=1.0)


def copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_same_bits(module: nn.Module, before: dict[str, Tensor]) -> None:
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


# Hidden states and head


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_hidden_states_and_head_give_the_models_own_logits(name: str, architecture: Make, ragged: Rows) -> None:
    """Ragged rows in one padded batch equal each row alone, and head(hidden) the module's logits: what loading proves
    on one row, here against `output_hidden_states` and `logits` of several. Says nothing of other architectures."""
    module, tokenizer = architecture(name)
    model = LanguageModel(module, tokenizer)
    contexts, answers = ragged
    with torch.no_grad():
        hidden_NH = model.hidden(contexts, answers)
        assert hidden_NH.shape == (sum(map(len, answers)), model.hidden_width)
        torch.testing.assert_close(hidden_NH, reference(module, contexts, answers), atol=2e-5, rtol=1e-5)
        start = 0
        for context, answer in zip(contexts, answers, strict=True):
            own_TV = module(input_ids=torch.tensor([context + answer])).logits[0, len(context) - 1 : -1]
            ours_TV = logits(model, hidden_NH[start : start + len(answer)])
            torch.testing.assert_close(ours_TV, own_TV[: len(answer), : model.num_tokens], atol=5e-5, rtol=1e-4)
            start += len(answer)


def test_rows_do_not_depend_on_their_batch(tiny_model: LanguageModel, ragged: Rows) -> None:
    """One by one, in another order, with other rows: the same hidden states (the published code gets this wrong)."""
    contexts, answers = ragged
    with torch.no_grad():
        together = tiny_model.hidden(contexts, answers).split([len(answer) for answer in answers])
        backwards = tiny_model.hidden(contexts[::-1], answers[::-1]).split([len(answer) for answer in answers[::-1]])
        for row in range(len(answers)):
            alone = tiny_model.hidden(contexts[row : row + 1], answers[row : row + 1])
            torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(backwards[-1 - row], alone, atol=1e-5, rtol=1e-5)


def test_bfloat16(tiny_folder: Path, ragged: Rows) -> None:
    """bfloat16 loads, proves its head, and gives bfloat16 states close to the float32 ones (2 %, its rounding)."""
    low = LanguageModel.load(tiny_folder, dtype="bfloat16", device="cpu")
    high = LanguageModel.load(tiny_folder, dtype=torch.float32, device="cpu")
    contexts, answers = ragged
    with torch.no_grad():
        hidden_low, hidden_high = low.hidden(contexts, answers), high.hidden(contexts, answers)
    assert low.dtype == hidden_low.dtype == torch.bfloat16
    assert (hidden_low.float() - hidden_high).norm() < 0.02 * hidden_high.norm()


@pytest.mark.parametrize(
    ("name", "tamper"),
    [
        ("cohere", lambda module: setattr(module, "logit_scale", 0.3)),
        ("granite", lambda module: setattr(module.lm_head, "forward", lambda x: 1.01 * (x @ module.lm_head.weight.T))),
        ("llama", lambda module: setattr(module.config, "final_logit_softcapping", 2.0)),
        ("gemma2", lambda module: setattr(module.lm_head, "forward", lambda x: 1.01 * (x @ module.lm_head.weight.T))),
    ],
)
def test_a_model_whose_logits_we_do_not_understand_is_refused(name: str, tamper: Any, architecture: Make) -> None:
    """A scale that is off by 1 %, one that the config does not tell, or a soft-cap that is not there."""
    module, tokenizer = architecture(name)
    tamper(module)
    with pytest.raises(UserError, match="does not know"):
        LanguageModel(module, tokenizer)


def test_a_model_that_overflows_is_refused(architecture: Make) -> None:
    module, tokenizer = architecture("llama")
    with torch.no_grad():
        module.lm_head.weight[3] = torch.inf
    with pytest.raises(UserError, match="not finite numbers"):
        LanguageModel(module, tokenizer)


def test_a_model_that_looks_ahead_is_refused(architecture: Make) -> None:
    """A bidirectional model would make padding and batches matter."""
    module, tokenizer = architecture("llama")
    module.config.is_causal = False
    for layer in module.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(UserError, match="not causal"):
        LanguageModel(module, tokenizer)


# Gradients


def test_gradients_are_those_of_the_plain_module(tiny_folder: Path) -> None:
    """Gradients through hidden() equal those through the module's own unpadded forward, for every parameter; the row of
    the padding id (which is the end of text) gets its gradient although torch would drop it."""
    model = LanguageModel.load(tiny_folder, dtype=torch.float32, device="cpu")
    contexts, answers = [[5, 6, 7], [8, 9, 0, 10, 11, 12]], [[13, 14, 15, 0], [16, 0]]
    probe_NH = torch.randn(6, model.hidden_width, generator=torch.Generator().manual_seed(0))
    parameters = dict(model.module.named_parameters())
    ours = torch.autograd.grad((model.hidden(contexts, answers) * probe_NH).sum(), list(parameters.values()))
    theirs = torch.autograd.grad(
        (reference(model.module, contexts, answers) * probe_NH).sum(), list(parameters.values())
    )
    for name, one, other in zip(parameters, ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4, msg=name)
    embedding = dict(zip(parameters, ours, strict=True))["model.embed_tokens.weight"]
    assert embedding[0].abs().max() > 0


def test_checkpointing_changes_memory_not_numbers(tiny_folder: Path, ragged: Rows) -> None:
    """With activation checkpointing states and gradients are the same, for stand-in weights too (the second run of the
    layers must not see the module's own). In float64, so that only a wrong tensor could make a difference."""
    model = LanguageModel.load(tiny_folder, dtype=torch.float64, device="cpu")
    contexts, answers = ragged
    own = dict(model.module.named_parameters())
    stand_ins = {name: (p.detach() * 1.1).requires_grad_() for name, p in own.items()}

    def gradients() -> list[Tensor]:
        hidden = [model.hidden(contexts, answers, weights=w) for w in (None, stand_ins)]
        return list(torch.autograd.grad(sum(h.square().sum() for h in hidden), [*own.values(), *stand_ins.values()]))

    plain = gradients()
    model.checkpoint_activations()
    calls = []
    layer = model.module.model.layers[0].mlp
    layer.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    for one, other in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)
    assert len(calls) == 4, "each of the two passes runs the layer twice"
    assert not model.module.training
    model.module.train()
    for one, other in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


def test_checkpointing_refuses_layers_that_would_drop(architecture: Make) -> None:
    """transformers checkpoints only modules in training mode, where a layer's own dropout would be back on."""
    module, tokenizer = architecture("llama")
    layer_type = type(module.model.layers[0])
    plain = layer_type.forward
    module.model.layers[0].forward = lambda x, **kw: nn.functional.dropout(
        plain(module.model.layers[0], x, **kw), 0.5, module.model.layers[0].training
    )
    model = LanguageModel(module, tokenizer)
    with pytest.raises(UserError, match="dropout"):
        model.checkpoint_activations()


def test_dropout_is_off_in_every_mode(architecture: Make, ragged: Rows) -> None:
    """A module left in training mode, with dropout configured, gives the same states; the mode is put back."""
    module, tokenizer = architecture("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    model = LanguageModel(module, tokenizer)
    contexts, answers = ragged
    expected = model.hidden(contexts, answers)
    module.train()
    module.transformer.h[1].eval()
    torch.testing.assert_close(model.hidden(contexts, answers), expected)
    assert module.training and module.transformer.h[0].mlp.training and not module.transformer.h[1].training


# Other weights, adapters


def test_stand_in_weights_equal_another_model_and_leave_no_trace(
    tiny_folder: Path, tiny_model: LanguageModel, ragged: Rows
) -> None:
    """hidden(weights) and head(weights) equal a model loaded with those weights, tied embeddings included; the module
    keeps its bits and its Parameter objects."""
    other = LanguageModel.load(tiny_folder, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        for parameter in other.module.parameters():
            parameter.mul_(1.2)
    weights = {name: p.detach().clone() for name, p in other.module.named_parameters()}
    before, objects = copies(tiny_model.module), [id(p) for p in tiny_model.module.parameters()]
    contexts, answers = ragged
    with torch.no_grad():
        borrowed = tiny_model.hidden(contexts, answers, weights=weights)
        assert torch.equal(borrowed, other.hidden(contexts, answers))
        assert not torch.equal(borrowed, tiny_model.hidden(contexts, answers))
    assert torch.equal(tiny_model.head(weights).weight_VH, other.head().weight_VH)
    assert tiny_model.head().weight_VH is tiny_model.module.lm_head.weight
    assert_same_bits(tiny_model.module, before)
    assert [id(p) for p in tiny_model.module.parameters()] == objects


def test_stand_ins_leave_when_the_pass_fails(tiny_model: LanguageModel) -> None:
    before = copies(tiny_model.module)
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(RuntimeError, match="dtype"):  # float64 in one matrix only
        tiny_model.hidden([[1]], [[2]], weights={name: tiny_model.module.get_parameter(name).double()})
    assert_same_bits(tiny_model.module, before)


def test_stand_ins_must_fit(tiny_model: LanguageModel) -> None:
    """A name the module does not have, or another shape: an error, never ignored."""
    with pytest.raises(AttributeError, match="nothing"):
        tiny_model.hidden([[1]], [[2]], weights={"model.nothing": torch.zeros(1)})
    with pytest.raises(ValueError, match="shape"):
        tiny_model.hidden([[1]], [[2]], weights={"model.norm.weight": torch.zeros(1)})


def test_low_precision_stand_ins_of_full_precision_masters(tiny_folder: Path, ragged: Rows) -> None:
    """bfloat16 copies as stand-ins compute in bfloat16, and their gradients arrive at the float32 parameters."""
    model = LanguageModel.load(tiny_folder, dtype=torch.float32, device="cpu")
    low = LanguageModel.load(tiny_folder, dtype=torch.bfloat16, device="cpu")
    contexts, answers = ragged
    weights = {name: p.bfloat16() for name, p in model.module.named_parameters()}
    hidden_NH = model.hidden(contexts, answers, weights=weights)
    assert hidden_NH.dtype == torch.bfloat16
    assert torch.equal(hidden_NH, low.hidden(contexts, answers))
    hidden_NH.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.module.parameters())


def with_lora(model: LanguageModel, **options: Any) -> LanguageModel:
    from peft import LoraConfig, get_peft_model

    defaults: dict[str, Any] = {"r": 4, "lora_dropout": 0.5, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = get_peft_model(model.module, LoraConfig(**(defaults | options)))  # type: ignore[arg-type]
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, 0.0, 0.1)
    return LanguageModel(module, model.tokenizer)


@pytest.fixture
def lora_model(tiny_folder: Path) -> LanguageModel:
    return with_lora(LanguageModel.load(tiny_folder, dtype=torch.float32, device="cpu"))


def test_adapter_off_is_the_base_model(lora_model: LanguageModel, tiny_model: LanguageModel, ragged: Rows) -> None:
    """Inside adapter_off the states are the base model's to the bit; base weights stay as they were through forward,
    backward and many switches (the published code drifts). Adapter dropout is off too."""
    base_bits = {name: p.detach().clone() for name, p in lora_model.module.named_parameters() if "lora_" not in name}
    contexts, answers = ragged
    on = lora_model.hidden(contexts, answers)
    with torch.no_grad():
        for _ in range(3):
            with lora_model.adapter_off():
                off = lora_model.hidden(contexts, answers)
        assert torch.equal(off, tiny_model.hidden(contexts, answers))
    assert torch.equal(lora_model.hidden(contexts, answers), on)
    assert (on - off).abs().max() > 0.1
    on.sum().backward()
    for name, parameter in lora_model.module.named_parameters():
        if "lora_" in name:
            assert parameter.requires_grad and parameter.grad is not None, name
        else:
            assert parameter.grad is None and torch.equal(parameter, base_bits[name]), name


def test_stand_ins_for_adapters(lora_model: LanguageModel, ragged: Rows) -> None:
    """An EMA teacher of a LoRA student gives stand-ins for the adapters only."""
    contexts, answers = ragged
    zeros = {name: torch.zeros_like(p) for name, p in lora_model.module.named_parameters() if p.requires_grad}
    with torch.no_grad():
        with lora_model.adapter_off():
            base = lora_model.hidden(contexts, answers)
        torch.testing.assert_close(lora_model.hidden(contexts, answers, weights=zeros), base)


def test_checkpointing_with_adapters(lora_model: LanguageModel, ragged: Rows) -> None:
    """A frozen base below trained adapters: the same adapter gradients with activation checkpointing as without."""
    adapters = [p for p in lora_model.module.parameters() if p.requires_grad]
    plain = torch.autograd.grad(lora_model.hidden(*ragged).square().sum(), adapters)
    lora_model.checkpoint_activations()
    for one, other in zip(plain, torch.autograd.grad(lora_model.hidden(*ragged).square().sum(), adapters), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_adapter_folder_is_loaded_onto_its_base(
    lora_model: LanguageModel, tiny_folder: Path, tmp_path: Path, ragged: Rows
) -> None:
    """A saved adapter comes back as base plus adapter, trainable, unmerged; one with missing weights is refused."""
    lora_model.module.peft_config["default"].base_model_name_or_path = str(tiny_folder)  # type: ignore[union-attr,index]
    lora_model.module.save_pretrained(tmp_path)
    loaded = LanguageModel.load(tmp_path, dtype=torch.float32, device="cpu")
    contexts, answers = ragged
    assert torch.equal(loaded.hidden(contexts, answers), lora_model.hidden(contexts, answers))
    trained = [name for name, p in loaded.module.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert len(loaded.tokenizer) == 38
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="does not fit its base model"):
        LanguageModel.load(tmp_path, dtype=torch.float32, device="cpu")


def test_an_adapted_head_is_refused(architecture: Make) -> None:
    """LoRA on the output head: at first it changes nothing, so the proof alone would let it in."""
    from peft import LoraConfig, get_peft_model

    for options in ({"target_modules": ["lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}):
        module, tokenizer = architecture("llama")
        with pytest.raises(UserError, match="output head"):
            LanguageModel(get_peft_model(module, LoraConfig(**options)), tokenizer)  # type: ignore[arg-type]


def test_no_adapter_to_switch_off(tiny_model: LanguageModel) -> None:
    with pytest.raises(UserError, match="no adapter"), tiny_model.adapter_off():
        pass


# Ids


def test_ids(tiny_model: LanguageModel) -> None:
    """Vocabulary from the tokenizer, stops from tokenizer and generation config, padding may be a stop."""
    assert tiny_model.num_tokens == 38 < tiny_model.head().weight_VH.shape[0] == 48
    assert tiny_model.stop_ids == {0, 1}
    assert tiny_model.pad_id == 0
    assert tiny_model.max_positions == 96


def test_stop_ids_may_be_one_number_and_must_be_some(architecture: Make) -> None:
    module, tokenizer = architecture("qwen3")
    module.generation_config.eos_token_id = 5
    assert LanguageModel(module, tokenizer).stop_ids == {0, 5}
    module.generation_config.eos_token_id = None
    assert LanguageModel(module, tokenizer).stop_ids == {0}
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="end-of-text"):
        LanguageModel(module, tokenizer)


def test_a_model_of_two_positions(architecture: Make) -> None:
    """The proof fits into the shortest model."""
    model = LanguageModel(*architecture("gpt2", max_position_embeddings=2))
    assert model.max_positions == 2 and len(model.hidden([[1]], [[2]])) == 1


def test_long_rows_are_refused(tiny_model: LanguageModel) -> None:
    with pytest.raises(UserError, match=r"row 1 needs 97 positions .* has 96"):
        tiny_model.hidden([[1], [1] * 90], [[2], [2] * 7])
    assert len(tiny_model.hidden([[1] * 90], [[2] * 6])) == 6


# Loading


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_folder, tmp_path / "copy")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def without_one_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("token*"):
        file.unlink()


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (shutil.rmtree, "there is no such folder"),
        (lambda folder: (folder / "config.json").unlink(), "cannot be loaded as a causal language model"),
        (without_weights, "cannot be loaded as a causal language model"),
        (without_one_weight, r"lacks 1 of the model's weights \(first: model.norm.weight\)"),
        (without_tokenizer, "has no tokenizer files"),
        (lambda folder: edit(folder / "config.json", model_type="t5"), "cannot be loaded as a causal language model"),
        (
            lambda folder: edit(folder / "config.json", hidden_size=40),
            "does not fit its config.json: 20 of its weights",
        ),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no"), "cannot be loaded as a causal"),
    ],
)
def test_broken_folders_are_refused_in_a_sentence(break_it: Any, sentence: str, folder: Path) -> None:
    """Random numbers never stand in for missing weights, and no library traceback reaches the user."""
    break_it(folder)
    with pytest.raises(UserError, match=sentence) as caught:
        LanguageModel.load(folder, dtype=torch.float32, device="cpu")
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_an_embedding_smaller_than_the_tokenizer_is_refused(architecture: Make) -> None:
    module, tokenizer = architecture("llama", vocab_size=30)
    with pytest.raises(UserError, match="30 output rows for a tokenizer of 38"):
        LanguageModel(module, tokenizer)


def test_an_encoder_is_refused(architecture: Make) -> None:
    module, tokenizer = architecture("llama")
    with pytest.raises(UserError, match="no language-model head"):
        LanguageModel(module.model, tokenizer)


def test_chat_template_from_a_file(tiny_folder: Path, tmp_path: Path) -> None:
    """A jinja file replaces the tokenizer's template (and is saved with it); "plain" leaves the tokenizer alone."""
    file = tmp_path / "chat.jinja"
    file.write_text("{{ messages[0].content }}!")
    model = LanguageModel.load(tiny_folder, dtype=torch.float32, device="cpu", chat_template=str(file))
    assert model.chat_template == model.tokenizer.chat_template == "{{ messages[0].content }}!"
    plain = LanguageModel.load(tiny_folder, dtype=torch.float32, device="cpu", chat_template="plain")
    assert plain.chat_template == "plain" != plain.tokenizer.chat_template


def test_a_device_without_float64_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apple's mps, whose torch says so with a TypeError; "auto" does not choose it."""
    ones = torch.ones

    def no_float64(*size: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        if device.type == "mps":
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework has none.")
        return ones(*size, device=device, dtype=dtype)

    monkeypatch.setattr(torch, "ones", no_float64)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *a, **k: torch.device("mps"))
    with pytest.raises(UserError, match=r"model.device = .mps. .*float64.*use .auto. or .cpu."):
        pick_device("mps")
    assert pick_device("auto").type in ("cpu", "cuda")


def test_kernels_that_take_bfloat16_alone(architecture: Callable[..., Any]) -> None:
    """A full student is kept in float32 and read in bfloat16, which is what flash attention is proved with."""
    seen = set()

    def flash(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.add(query.dtype)
        assert query.dtype == torch.bfloat16, "only bfloat16"
        return sdpa_attention_forward(module, query, *args, **kwargs)

    AttentionInterface.register("own_flash", flash)
    AttentionMaskInterface.register("own_flash", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    module, tokenizer = architecture("qwen3")
    module.config._attn_implementation = "own_flash"  # the setter would ask the hub for a kernel of this name
    model = LanguageModel(module, tokenizer)
    model.checkpoint_activations()
    assert seen == {torch.bfloat16} and model.dtype == torch.float32
