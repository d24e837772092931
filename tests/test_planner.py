"""What a trio needs and where its layers go: laws over many machines."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from trimix_gguf.errors import ModelError
from trimix_gguf.machine import memory
from trimix_gguf.machine.gguf_file import GGUFFile, TensorInfo, read_gguf
from trimix_gguf.machine.loading import AUTO, Loading
from trimix_gguf.machine.native import Device
from trimix_gguf.machine.placement import MARGIN, RAM
from trimix_gguf.machine.planner import plan
from trimix_gguf.roles import ROLES

GIB = 1 << 30


def a_file(name, *, n_layer, n_embd, n_vocab=152_064, bits=4.8, tied=False, quantized=True):
    """What a GGUF of these sizes declares; nothing is written."""
    kind = "Q6_K" if quantized else "F16"
    tensors = []

    def add(tensor, *shape):
        size = 1
        for n in shape:
            size *= n
        tensors.append(TensorInfo(tensor, shape, kind, 0, int(size * bits / 8)))

    add("token_embd.weight", n_embd, n_vocab)
    for i in range(n_layer):
        # Layers differ, as mixed quantizations make them.
        add(f"blk.{i}.attn.weight", n_embd, 3 * n_embd + 256 * (i % 3))
        add(f"blk.{i}.ffn.weight", n_embd, 9 * n_embd)
    if not tied:
        add("output.weight", n_embd, n_vocab)
    hparams = {
        "context_length": 32768,
        "embedding_length": n_embd,
        "block_count": n_layer,
        "feed_forward_length": 3 * n_embd,
        "attention.head_count": n_embd // 128,
        "attention.head_count_kv": max(n_embd // 512, 1),
        "attention.key_length": 128,
        "attention.value_length": 128,
    }
    metadata = {"general.architecture": "qwen2", "tokenizer.ggml.tokens": ["t"] * n_vocab}
    metadata |= {f"qwen2.{key}": value for key, value in hparams.items()}
    size = sum(tensor.n_bytes for tensor in tensors)
    return GGUFFile(Path(f"{name}.gguf"), 3, metadata, tuple(tensors), size)


FAMILIES = [
    {"large_ins": a_file(f"large{i}", n_layer=large[0], n_embd=large[1])}
    | {
        role: a_file(f"{role}{i}", n_layer=small[0], n_embd=small[1], bits=bits, tied=tied)
        for role in ("small_cpt", "small_base")
    }
    for i, (large, small, bits, tied) in enumerate(
        [
            ((48, 5120), (28, 1536), 4.8, False),
            ((36, 2048), (24, 1024), 8.5, True),
            ((28, 1536), (28, 1536), 16, True),
        ]
    )
]


def card(name, free, kind="GPU", description=None):
    return Device(name, description or f"card {name}", kind, free, free, 0)


def machines(n, seed):
    """(files, options, devices, free RAM, rng): n trios on random machines."""
    rng = random.Random(seed)
    for _ in range(n):
        files = dict(rng.choice(FAMILIES))
        if rng.random() < 0.3:
            files["small_cpt"] = files["small_base"]  # one file twice, as with an adapter
        devices = [
            card(f"CUDA{i}", int(rng.uniform(0, 14) * GIB))
            for i in range(rng.choice([0, 1, 1, 2, 3]))
        ]
        if rng.random() < 0.15:
            devices = [card("MTL0", int(rng.uniform(1, 30) * GIB))]
        n_ctx = rng.choice([512, 2048, 8192, 32768])
        kind = rng.choice(["f16", "q8_0"])
        own = {"n_ctx": n_ctx, "type_k": kind, "type_v": kind}
        devices = [card("CPU", 0, "CPU"), *devices]
        yield files, dict.fromkeys(ROLES, own), devices, int(rng.uniform(0.5, 30) * GIB), rng


def tight_machines(n, seed):
    """As machines(), with about as much RAM as the trio needs."""
    for files, options, devices, _, rng in machines(n, seed):
        need = plan(files, devices=devices, free_ram=64 * GIB, options=options).ram_needed
        yield files, options, devices, int(need * rng.uniform(0.4, 1.05)), rng


def loadings(options):
    return {role: Loading(**given) for role, given in options.items()}


def layers(found):
    return {role: own.n_layers for role, own in found.models.items()}


# -- laws -------------------------------------------------------------------------------------


def test_without_cards_all_is_on_the_cpu_and_is_the_estimate():
    for files, options, _, ram, _ in machines(60, seed=1):
        found = plan(files, devices=[card("CPU", 0, "CPU")], free_ram=ram, options=options)
        need = memory.estimate(memory.Models(files, loadings(options)))
        assert list(found.rooms) == [RAM] and set(layers(found).values()) == {0}
        room = found.rooms[RAM].need
        assert need == {"weights": room.weights, "kv": room.kv, "buffers": room.buffers}
        assert found.fits == (sum(need.values()) <= ram)
        assert found.load_options("large_ins") == {"n_gpu_layers": 0}


def test_what_is_placed_sums_to_the_estimate_and_what_offloading_doubles():
    for files, options, devices, ram, _ in machines(200, seed=2):
        found = plan(files, devices=devices, free_ram=ram, options=options)
        need = memory.estimate(memory.Models(files, loadings(options)))
        facts = memory.by_role(memory.Models(files, loadings(options)))
        rooms = [room.need for room in found.rooms.values()]
        away = [role for role, n in layers(found).items() if n]
        doubled = sum(facts[role].tied - facts[role].tied_ram for role in away)
        assert sum(room.kv for room in rooms) == need["kv"]
        assert sum(room.weights for room in rooms) == need["weights"] + doubled
        # Work space on the device and beside it, in place of that of plain attention.
        compute = sum(2 * facts[role].compute - facts[role].compute_cpu for role in away)
        assert sum(room.buffers for room in rooms) == need["buffers"] + compute
        by_model = sum((m.on_device + m.in_ram for m in found.models.values()), memory.Need())
        assert by_model.total + found.program == sum(room.total for room in rooms)


def test_offloading_leaves_the_margin_and_unified_memory_is_counted_once():
    n_unified = 0
    for files, options, devices, ram, _ in (*machines(150, seed=3), *tight_machines(150, seed=9)):
        found = plan(files, devices=devices, free_ram=ram, options=options)
        for name, room in found.rooms.items():
            assert name == RAM or room.need.total <= max(room.free - MARGIN, 0)
        here = found.rooms[RAM].need.total
        unified = sum(room.need.total for room in found.rooms.values() if room.is_ram)
        assert found.ram_needed == here + unified
        without = plan(files, devices=[], free_ram=ram, options=options)
        assert found.fits or not without.fits, "a card made a trio that fits unfit"
        n_unified += unified > 0
    assert n_unified > 3


def test_more_memory_never_offloads_less():
    for files, options, devices, ram, rng in machines(300, seed=4):
        before = layers(plan(files, devices=devices, free_ram=ram, options=options))
        more = list(devices)
        i, extra = rng.randrange(len(more)), int(rng.uniform(0, 6) * GIB)
        more[i] = replace(more[i], free=more[i].free + extra)
        after = layers(plan(files, devices=more, free_ram=ram + extra, options=options))
        assert all(after[role] >= n for role, n in before.items()), (before, after, more[i].name)


def test_large_ins_is_never_below_the_small_ones():
    n_parts = 0
    for files, options, devices, ram, _ in machines(200, seed=5):
        found = plan(files, devices=devices, free_ram=ram, options=options)
        tiny = a_file("tiny", n_layer=2, n_embd=256)
        alone = {**files, "small_cpt": tiny, "small_base": tiny}
        if not any(room.is_ram for room in found.rooms.values()):
            other = plan(alone, devices=devices, free_ram=ram, options=options)
            assert layers(other)["large_ins"] == layers(found)["large_ins"]
        large = found.models["large_ins"]
        n_parts += 0 < large.n_layers < large.most
        for role in ("small_cpt", "small_base"):
            own = found.models[role]
            if own.n_layers and large.n_layers < large.most:
                assert own.device != large.device and len(found.rooms) > 2
    assert n_parts > 20


def test_a_model_goes_whole_to_a_card_that_holds_it_and_else_as_far_as_it_fits():
    for files, options, devices, ram, _ in machines(200, seed=6):
        found = plan(files, devices=devices, free_ram=ram, options=options)
        facts = memory.by_role(memory.Models(files, loadings(options)))["large_ins"]
        rooms = [d.free - MARGIN for d in devices if d.kind == "GPU"]
        if not rooms or any(room.is_ram for room in found.rooms.values()):
            continue
        n = found.models["large_ins"].n_layers
        assert n == 0 or facts.on_device(n).total <= max(rooms)
        assert n == facts.n_layers or facts.on_device(n + 1).total > max(rooms)


def test_roles_that_share_a_file_go_together_and_pay_for_it_once():
    files = {**FAMILIES[0], "small_cpt": FAMILIES[0]["small_base"]}
    adapter = replace(
        files["small_base"],
        path=Path("lora.gguf"),
        tensors=(TensorInfo("blk.27.attn.weight.lora_a", (1536, 8), "F16", 0, 8 << 20),),
    )
    for gib in (1, 2, 4, 12, 24):
        found = plan(files, devices=[card("CUDA0", gib * GIB)], free_ram=64 * GIB, lora=adapter)
        cpt, base = found.models["small_cpt"], found.models["small_base"]
        assert (cpt.device, cpt.n_layers) == (base.device, base.n_layers)
        assert base.shares == "small_cpt" and cpt.shares is None
        assert (
            base.on_device.weights == base.in_ram.weights == 0 < base.on_device.kv + base.in_ram.kv
        )
        here = cpt.on_device.weights + cpt.in_ram.weights
        assert here == files["small_base"].weight_bytes + (8 << 20)
        assert not cpt.n_layers or cpt.on_device.weights > 8 << 20  # its layer went first


def test_what_the_user_fixed_stays_and_the_rest_goes_around_it():
    devices = [card("CUDA0", 24 * GIB), card("CUDA1", 8 * GIB)]
    options = {
        "large_ins": {"n_gpu_layers": 5, "device": "cuda1"},
        "small_cpt": {"n_gpu_layers": AUTO, "device": "CPU"},
        "small_base": {},
    }
    found = plan(FAMILIES[0], devices=devices, free_ram=64 * GIB, options=options)
    places = {role: (own.device, own.n_layers) for role, own in found.models.items()}
    assert places == {
        "large_ins": ("CUDA1", 5),
        "small_cpt": ("CPU", 0),
        "small_base": ("CUDA0", 29),
    }
    assert found.load_options("small_cpt") == {"n_gpu_layers": 0, "device": "CPU"}
    everything = {"large_ins": {"n_gpu_layers": -1, "device": "CUDA1"}}
    found = plan(FAMILIES[0], devices=devices, free_ram=64 * GIB, options=everything)
    assert layers(found)["large_ins"] == 49 and not found.fits
    assert "CUDA1" in found.refusal() and "--gpu-layers auto" in found.refusal()
    with pytest.raises(ModelError, match="NoSuch.*CUDA0, CUDA1"):
        plan(
            FAMILIES[0], devices=devices, free_ram=GIB, options={"large_ins": {"device": "NoSuch"}}
        )


def test_one_card_behind_two_backends_counts_once_and_integrated_ones_come_last():
    same = [card("CUDA0", 8 * GIB, description="RTX"), card("Vulkan0", 8 * GIB, description="RTX")]
    found = plan(FAMILIES[1], devices=same, free_ram=64 * GIB)
    assert list(found.rooms) == [RAM, "CUDA0"]
    twins = [card("CUDA0", 8 * GIB, description="RTX"), card("CUDA1", 8 * GIB, description="RTX")]
    assert len(plan(FAMILIES[1], devices=twins, free_ram=64 * GIB).rooms) == 3
    inside = card("Vulkan0", 30 * GIB, kind="integrated GPU")
    found = plan(FAMILIES[1], devices=[inside, twins[0]], free_ram=64 * GIB)
    assert {own.device for own in found.models.values()} == {"CUDA0"}
    found = plan(FAMILIES[1], devices=[inside], free_ram=64 * GIB)
    assert {own.device for own in found.models.values()} == {"Vulkan0"} and found.rooms[
        "Vulkan0"
    ].is_ram


# -- advice -----------------------------------------------------------------------------------


def options_of(change):
    words = iter(change.option.split())
    return {word: True if word == "--flash-attn" else next(words) for word in words}


def test_the_context_advised_fits_and_one_step_more_does_not():
    n_found = 0
    for files, options, devices, ram, _ in tight_machines(80, seed=7):
        found = plan(files, devices=devices, free_ram=ram, options=options)
        assert bool(found.advice) <= (not found.fits)
        for change in found.advice:
            given = options_of(change)
            if set(given) != {"--n-ctx"}:
                continue

            def fits(n_ctx, files=files, devices=devices, ram=ram, options=options):
                own = {role: {**options[role], "n_ctx": n_ctx} for role in ROLES}
                return plan(files, devices=devices, free_ram=ram, options=own).fits

            n_ctx = int(given["--n-ctx"])
            assert n_ctx % memory.CTX_STEP == 0 and fits(n_ctx) == change.suffices
            assert not fits(n_ctx + memory.CTX_STEP)
            n_found += change.suffices
    assert n_found > 5


def test_advice_saves_what_it_says_and_suffices_where_it_says():
    seen = set()
    for files, options, devices, ram, _ in tight_machines(120, seed=8):
        found = plan(files, devices=devices, free_ram=ram, options=options)
        before = sum(room.need.total for room in found.rooms.values())
        for change in found.advice:
            given, now = options_of(change), options["large_ins"]
            seen.add((*sorted(given), change.suffices))
            kind = given.get("--kv-type", now["type_k"])
            own = {"n_ctx": int(given.get("--n-ctx", now["n_ctx"])), "type_k": kind, "type_v": kind}
            own["flash_attn"] = given.get("--flash-attn")
            changed, lora = dict(files), None
            if "--small-cpt-lora" in given:
                changed["small_cpt"], lora = (
                    files["small_base"],
                    memory.adapter_of(files["small_base"]),
                )
            elif change.command is not None:
                role = max(ROLES, key=lambda role, files=files: files[role].weight_bytes)
                kind = change.command.split(" --type ")[1].split()[0]
                smaller = memory.as_quantized(files[role], kind)
                same = [r for r in ROLES if files[r].path == files[role].path]
                changed |= dict.fromkeys(same, smaller)
                assert str(smaller.path) in change.option
            then = plan(
                changed,
                devices=devices,
                free_ram=ram,
                options=dict.fromkeys(ROLES, own),
                lora=lora,
            )
            after = sum(room.need.total for room in then.rooms.values())
            assert then.fits == change.suffices and change.saves >= max(before - after, 1)
    assert {("--kv-type", True), ("--kv-type", False), ("--n-ctx", True)} <= seen
    assert ("--flash-attn", False) in seen
    files_given = ("--large-ins", "--small-base", "--small-cpt")
    assert {(*files_given, True), (*files_given[:2], "--small-cpt-lora", True)} <= seen
    assert any({"--large-ins", "--n-ctx", True} <= set(one) for one in seen)  # together


def test_flash_attention_is_advised_unless_it_was_decided():
    def advised(ram, **own):
        found = plan(FAMILIES[0], devices=[], free_ram=ram, options=dict.fromkeys(ROLES, own))
        return {c.option: c.suffices for c in found.advice}.get("--flash-attn"), found.ram_needed

    for n_ctx in (4096, 32768):
        need, flash = (advised(64 * GIB, n_ctx=n_ctx, flash_attn=f)[1] for f in (None, True))
        assert flash < need == advised(64 * GIB, n_ctx=n_ctx, flash_attn=False)[1]
        assert advised(need, n_ctx=n_ctx)[0] is None
        assert advised(flash, n_ctx=n_ctx)[0] and not advised(flash - 1, n_ctx=n_ctx)[0]
        assert advised(flash - 1, n_ctx=n_ctx)[0] is not None
        assert advised(flash, n_ctx=n_ctx, flash_attn=False)[0] is None
        assert advised(flash, n_ctx=n_ctx, type_v="q8_0")[0] is None


def test_narrow_caches_have_flash_attention_and_are_advised_without_it():
    files = {
        role: a_file(role, n_layer=36, n_embd=4096, bits=16, quantized=False) for role in ROLES
    }
    options = dict.fromkeys(ROLES, {"n_ctx": 32768})
    need = plan(files, devices=[], free_ram=64 * GIB, options=options).ram_needed
    together = []
    for share in (0.6, 0.65, 0.7, 0.75):
        found = plan(files, devices=[], free_ram=int(share * need), options=options)
        together += [c.option.split() for c in found.advice if "together" in c.what]
    assert together and all("--kv-type" in words for words in together)
    assert not any("--flash-attn" in words for words in together)


def test_a_smaller_quantization_is_the_best_that_suffices():
    files = {
        role: a_file(role, n_layer=36, n_embd=4096, bits=16, quantized=False) for role in ROLES
    }
    full = memory.estimate(memory.Models(files, {}))
    need, size = sum(full.values()), files["large_ins"].weight_bytes
    for room, name in ((0.6, "q8_0"), (0.45, "q6_k"), (0.4, "q5_k_m"), (0.34, "q4_k_m")):
        found = plan(files, devices=[], free_ram=int(need - size * (1 - room)))
        change = next(c for c in found.advice if c.command)
        assert change.suffices and f"--type {name}" in change.command
        assert "--requantize" not in change.command and f"large_ins-{name}.gguf" in change.option
    assert "would do" in found.refusal()
    hopeless = plan(files, devices=[], free_ram=GIB)
    assert not any(change.suffices for change in hopeless.advice)
    assert "smaller trio" in hopeless.refusal()


@pytest.mark.parametrize("name", ["q6_k", "q5_k_m", "q4_k_m", "q4_0", "q3_k_m"])
def test_sizes_of_quantized_files_are_near_what_llama_cpp_makes(trimix, tmp_path, nano_files, name):
    source, out = nano_files["large_ins"], tmp_path / "out.gguf"
    trimix("convert", "quantize", source, out, "--type", name, "--requantize")
    guess = memory.as_quantized(read_gguf(source), name).weight_bytes
    assert guess == pytest.approx(read_gguf(out).weight_bytes, rel=0.05)
