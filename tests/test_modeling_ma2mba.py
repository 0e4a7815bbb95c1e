"""The model against a naive form that takes one frame and one token at a time, in float64."""

import copy
import math

import pytest
import torch
from tiny import VOCABULARY, pad_left, random_pixels, tiny_config, tiny_model
from torch.testing import assert_close
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from transformers_ma2mba.modeling_ma2mba import pool_patches

KINDS = ["clip", "siglip"]
EXACT = dict(rtol=0, atol=1e-12)  # float64 throughout
# The language model computes norms, scans and logits in float32, and rounds in each layer.
ROUNDED = dict(rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def double(config):
    """The tiny model in float64."""
    return tiny_model(config, dtype=torch.float64)


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """Convert uint8 pixels to the input of the vision encoder, in float64."""
    mean = torch.tensor(OPENAI_CLIP_MEAN, dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor(OPENAI_CLIP_STD, dtype=torch.float64).view(3, 1, 1)
    return (pixels.double() / 255 - mean) / std


def naive_pool(grid: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
    """Interpolate a square grid bilinearly to half its side, rounded up, at pixel centres, without antialiasing."""
    side = len(grid)
    pooled_side = math.ceil(side / 2)
    weights = []  # of the source rows, for each target row; the same for columns
    for target in range(pooled_side):
        position = max((target + 0.5) * side / pooled_side - 0.5, 0.0)
        below = min(math.floor(position), side - 1)
        above = min(below + 1, side - 1)
        weights.append([(below, 1 - (position - below)), (above, position - below)])
    return [
        [sum(wy * wx * grid[y][x] for y, wy in rows for x, wx in columns) for columns in weights] for rows in weights
    ]


def naive_frame_tokens(model, frame: torch.Tensor) -> torch.Tensor:
    """Convert one frame, `(3, height, width)` normalised pixels, to tokens by the steps of the paper."""
    tower = model.model.vision_tower
    hidden = tower.embeddings(frame[None])
    if hasattr(tower, "pre_layrnorm"):
        hidden = tower.pre_layrnorm(hidden)
    for layer in tower.encoder.layers[:-1]:  # up to the penultimate layer
        hidden = layer(hidden, None)
    features = list(hidden[0])
    if hasattr(tower.embeddings, "class_embedding"):
        features = features[1:]
    side = math.isqrt(len(features))
    assert side * side == len(features)
    grid = [features[row * side : (row + 1) * side] for row in range(side)]
    tokens = []
    for row in naive_pool(grid):
        for feature in row:
            first, second = model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2
            inner = first.weight @ feature + first.bias
            inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))  # GELU
            tokens.append(second.weight @ inner + second.bias)
    return torch.stack(tokens)


def naive_embeddings(model, input_ids, images, videos):
    """Embeddings of one text, with each placeholder replaced by the next token of its kind.

    Images and videos are frames of normalised pixels.
    """
    config = model.config
    waiting = {
        config.image_token_id: [token for frame in images for token in naive_frame_tokens(model, frame)],
        config.video_token_id: [token for frame in videos for token in naive_frame_tokens(model, frame)],
    }
    table = model.get_input_embeddings().weight
    rows = [waiting[token].pop(0) if token in waiting else table[token] for token in input_ids.tolist()]
    assert not any(waiting.values())
    return torch.stack(rows)


def inputs_of_the_language_model(model, **inputs):
    """The embeddings that the language model receives."""
    seen = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    try:
        model(**inputs)
    finally:
        handle.remove()
    return seen[0]


def sample(config, *content):
    """Token ids from numbers, and from "video" and "image", which stand for the placeholders of one frame."""
    placeholders = {"video": config.video_token_id, "image": config.image_token_id}
    ids = []
    for item in content:
        ids += [placeholders[item]] * config.tokens_per_frame if isinstance(item, str) else [item]
    return torch.tensor([ids])


# From frames to tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("patches", [1, 2, 3, 4, 5, 7])
@torch.no_grad()
def test_frame_tokens_equal_the_naive_path(kind, patches):
    config = tiny_config(kind, vision=dict(image_size=8 * patches + 3))  # the remaining 3 px do not make a patch
    model = tiny_model(config, dtype=torch.float64)
    frames = normalise(random_pixels(4, config.vision_config.image_size))
    tokens = model.get_video_features(frames).pooler_output
    assert tokens.shape == (4, math.ceil(patches / 2) ** 2, config.text_config.hidden_size)
    assert config.tokens_per_frame == tokens.shape[1]
    assert_close(tokens, torch.stack([naive_frame_tokens(model, frame) for frame in frames]), **EXACT)


def test_bilinear_pooling_of_even_grids_averages_blocks():
    grid = torch.randn(2, 36, 5, dtype=torch.float64)
    blocks = grid.view(2, 3, 2, 3, 2, 5).mean((2, 4)).view(2, 9, 5)
    assert_close(pool_patches(grid, "bilinear", 2), blocks, **EXACT)


@pytest.mark.parametrize("mode", ["average", "max"])
@pytest.mark.parametrize("side, stride", [(4, 2), (5, 2), (5, 3), (7, 4), (3, 9)])
def test_average_and_max_pooling_take_blocks_from_the_top_left(mode, side, stride):
    """Blocks at the edge may be smaller."""
    features = torch.randn(2, side**2, 5, dtype=torch.float64)
    grid = features.view(2, side, side, 5)
    expected = []
    for top in range(0, side, stride):
        for left in range(0, side, stride):
            block = grid[:, top : top + stride, left : left + stride].flatten(1, 2)
            expected.append(block.mean(1) if mode == "average" else block.max(1).values)
    assert_close(pool_patches(features, mode, stride), torch.stack(expected, 1), **EXACT)


@pytest.mark.parametrize("mode", ["bilinear", "average", "max"])
@pytest.mark.parametrize("patches, pooled", [(4, 2), (5, 2), (7, 3)])
@torch.no_grad()
def test_pooling_that_rounds_down_leaves_out_the_edge(mode, patches, pooled):
    options = dict(spatial_pool_mode=mode, spatial_pool_rounding="down", vision=dict(image_size=8 * patches))
    config = tiny_config(**options)
    assert config.tokens_per_frame == pooled**2
    features = torch.randn(2, patches**2, 5, dtype=torch.float64)
    tokens = pool_patches(features, mode, 2, "down")
    assert tokens.shape == (2, pooled**2, 5)
    if mode != "bilinear":
        inner = features.view(2, patches, patches, 5)[:, : 2 * pooled, : 2 * pooled].flatten(1, 2)
        assert_close(tokens, pool_patches(inner, mode, 2), **EXACT)
    model = tiny_model(config)
    assert model.get_video_features(random_pixels(2, 8 * patches)).pooler_output.shape[1] == config.tokens_per_frame


@pytest.mark.parametrize("layer", [-4, -1, 0, 1, 3])
@torch.no_grad()
def test_vision_feature_layer_selects_the_hidden_states(layer):
    model = tiny_model(tiny_config(vision_feature_layer=layer), dtype=torch.float64)
    tower, frames = model.model.vision_tower, normalise(random_pixels(2))
    hidden = [tower.pre_layrnorm(tower.embeddings(frames))]
    for block in tower.encoder.layers:
        hidden.append(block(hidden[-1], None))
    expected = model.model.multi_modal_projector(pool_patches(hidden[layer][:, 1:], "bilinear", 2))
    assert_close(model.get_video_features(frames).pooler_output, expected, **EXACT)


@pytest.mark.parametrize("frames_per_vision_pass", [1, 2, 7, 100])
@torch.no_grad()
def test_frames_per_vision_pass_does_not_change_the_tokens(double, monkeypatch, frames_per_vision_pass):
    frames = normalise(random_pixels(7))
    expected = torch.stack([naive_frame_tokens(double, frame) for frame in frames])
    sizes = []
    handle = double.model.vision_tower.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    monkeypatch.setattr(double.config, "frames_per_vision_pass", frames_per_vision_pass)
    assert_close(double.get_video_features(frames).pooler_output, expected, **EXACT)
    handle.remove()
    assert sum(sizes) == 7 and max(sizes) == min(frames_per_vision_pass, 7)


@torch.no_grad()
def test_uint8_pixels_are_normalised_in_the_model(double, model):
    pixels = random_pixels(3)
    normalised = normalise(pixels)
    # A float64 model also converts pixels to float32 first.
    assert_close(
        double.get_video_features(pixels).pooler_output,
        double.get_video_features(normalised).pooler_output,
        rtol=1e-5,
        atol=1e-5,
    )
    assert_close(
        model.get_image_features(pixels).pooler_output,
        model.get_image_features(normalised.float()).pooler_output,
        rtol=1e-4,
        atol=1e-5,
    )


@torch.no_grad()
def test_normalisation_follows_the_configuration():
    plain = tiny_config(image_mean=[0.0, 0.0, 0.0], image_std=[1.0, 1.0, 1.0])
    model = tiny_model(plain)
    pixels = random_pixels(2)
    expected = model.get_video_features(pixels.float() / 255).pooler_output
    assert torch.equal(model.get_video_features(pixels).pooler_output, expected)


@torch.no_grad()
def test_images_get_the_features_of_video_frames(double):
    pixels = random_pixels(3)
    images, video = double.get_image_features(pixels), double.get_video_features(pixels)
    assert torch.equal(images.pooler_output, video.pooler_output)


@torch.no_grad()
def test_bfloat16_logits_are_close_to_float32(config):
    model = tiny_model(config, dtype=torch.bfloat16)
    input_ids = sample(config, 5, "video", "video", 9)
    logits = model(input_ids=input_ids, pixel_values_videos=random_pixels(2)).logits
    assert logits.dtype == torch.float32 and logits.isfinite().all()
    single = tiny_model(config)(input_ids=input_ids, pixel_values_videos=random_pixels(2)).logits
    assert (logits - single).abs().max() < 0.1 * single.abs().max()


# From tokens to the text


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_interleaved_images_and_videos_equal_the_naive_path(kind):
    config = tiny_config(kind)
    model = tiny_model(config, dtype=torch.float64)
    input_ids = sample(config, 5, "image", 6, "video", "video", 7, 8, "image", "image", "video", 9)
    frames = normalise(random_pixels(6))
    images, videos = frames[:3], frames[3:]
    inputs = dict(input_ids=input_ids, pixel_values=images, pixel_values_videos=videos)
    expected = naive_embeddings(model, input_ids[0], images, videos)
    assert_close(inputs_of_the_language_model(model, **inputs)[0], expected, **EXACT)

    naive_logits = model(inputs_embeds=expected[None]).logits
    assert_close(model(**inputs).logits, naive_logits, **ROUNDED)
    assert naive_logits.std() > 0.1  # otherwise the comparison would prove little


@torch.no_grad()
def test_placeholders_distribute_frames_over_a_batch(double, config):
    """Three texts, two of them padded on the left: a video and an image, an image alone, a longer video."""
    texts = [sample(config, 5, "video", 6, "image", 7), sample(config, 8, "image", 9)]
    texts.append(sample(config, "video", "video", "video", 4, 3))
    input_ids = pad_left(texts, 1)
    mask = pad_left([torch.ones_like(text) for text in texts], 0)
    frames = normalise(random_pixels(6))
    images, videos = frames[:2], frames[2:]
    output = double(input_ids=input_ids, attention_mask=mask, pixel_values=images, pixel_values_videos=videos)

    for row, (image, video) in enumerate([((0, 1), (0, 1)), ((1, 2), (1, 1)), ((2, 2), (1, 4))]):
        embeddings = naive_embeddings(double, texts[row][0], images[slice(*image)], videos[slice(*video)])
        alone = double(inputs_embeds=embeddings[None]).logits[0]
        assert_close(output.logits[row, -len(alone) :], alone, **ROUNDED)


@torch.no_grad()
def test_embeddings_may_replace_ids(double, config):
    input_ids = sample(config, 5, "image", "video", 9)
    pixels = dict(pixel_values=random_pixels(1), pixel_values_videos=random_pixels(1, seed=1))
    embeddings = double.get_input_embeddings()(input_ids)
    assert torch.equal(double(inputs_embeds=embeddings, **pixels).logits, double(input_ids, **pixels).logits)


@torch.no_grad()
def test_features_may_replace_pixels(double, config):
    input_ids = sample(config, 5, "image", "video", 9)
    images, videos = random_pixels(1), random_pixels(1, seed=1)
    features = {"image": double.get_image_features(images), "video": double.get_video_features(videos)}
    expected = double(input_ids, pixel_values=images, pixel_values_videos=videos).logits
    assert torch.equal(double(input_ids, mm_encoder_outputs=features).logits, expected)


# Logits and the recurrent state


@pytest.mark.parametrize(
    "keep",
    [0, 1, 3, torch.tensor([0]), torch.tensor([2, 5, 6])],
    ids=["all", "last", "last-three", "first", "chosen"],
)
@torch.no_grad()
def test_logits_to_keep_selects_the_rows_of_the_head(model, keep):
    input_ids = torch.arange(10, 22).view(2, 6)
    input_ids = torch.cat([input_ids, input_ids + 5], 1)
    full = model(input_ids).logits
    assert full.shape == (2, 12, VOCABULARY)
    rows = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
    logits = model(input_ids, logits_to_keep=keep).logits
    handle.remove()
    expected = full[:, keep] if isinstance(keep, torch.Tensor) else full[:, -keep:] if keep else full
    assert_close(logits, expected, **ROUNDED)
    assert rows == [expected.shape[1]]


@pytest.mark.parametrize("cut", [1, 7, 8, 9, 12])
@torch.no_grad()
def test_second_half_continues_from_the_state_of_the_first(double, config, cut):
    """Chunks have 8 tokens, so the cuts fall before, at and after their borders."""
    input_ids = sample(config, 5, "video", 3, "video", 9, 4, 7)
    pixels = random_pixels(2)
    whole = double(input_ids, pixel_values_videos=pixels, use_cache=True)
    features = double.get_video_features(pixels).pooler_output.flatten(0, 1)
    embeddings = double.get_input_embeddings()(input_ids)
    embeddings[input_ids == config.video_token_id] = features
    first = double(inputs_embeds=embeddings[:, :cut], use_cache=True)
    second = double(inputs_embeds=embeddings[:, cut:], cache_params=first.cache_params, use_cache=True)
    assert_close(torch.cat([first.logits, second.logits], 1), whole.logits, **ROUNDED)
    for ours, theirs in zip(second.cache_params.layers, whole.cache_params.layers, strict=True):
        assert_close(ours.recurrent_states[0], theirs.recurrent_states[0], **ROUNDED)
        assert_close(ours.conv_states[0], theirs.conv_states[0], **ROUNDED)


@torch.no_grad()
def test_output_hidden_states_returns_all_layers(model, config):
    output = model(sample(config, 5, 6, 7), output_hidden_states=True)
    assert len(output.hidden_states) == config.text_config.num_hidden_layers + 1
    assert_close(model.lm_head(output.hidden_states[-1]), output.logits)
    assert model(sample(config, 5, 6, 7)).hidden_states is None


@torch.no_grad()
def test_training_returns_the_state_only_with_use_cache(model, config):
    input_ids = sample(config, 5, 6, 7)
    assert model(input_ids, use_cache=False).cache_params is None
    assert model(input_ids, labels=input_ids).cache_params is None
    assert model(input_ids, labels=input_ids, use_cache=True).cache_params is not None


# Mismatched inputs


@pytest.mark.parametrize(
    "pixels, message",
    [
        (torch.zeros(2, 3, 24, 24), "24 x 24 px, but this checkpoint's vision encoder takes 32 x 32 px"),
        (torch.zeros(2, 3, 32, 40), "32 x 40 px, but this checkpoint's vision encoder takes 32 x 32 px"),
        (torch.zeros(2, 32, 32, 3), r"must have shape \(frames, 3, 32, 32\).*got \(2, 32, 32, 3\)"),
        (torch.zeros(3, 32, 32), r"must have shape \(frames, 3, 32, 32\).*got \(3, 32, 32\)"),
        (torch.zeros(1, 2, 3, 32, 32), r"must have shape .*got \(1, 2, 3, 32, 32\)"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.int64), "must be uint8, or floating point.*got torch.int64"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.bool), "must be uint8, or floating point.*got torch.bool"),
    ],
    ids=["small", "wide", "channels-last", "one-frame", "batch-axis", "int64", "bool"],
)
@pytest.mark.parametrize("name", ["pixel_values", "pixel_values_videos"])
def test_pixels_of_a_wrong_shape_or_type_are_refused(model, config, name, pixels, message):
    placeholder = "image" if name == "pixel_values" else "video"
    with pytest.raises(ValueError, match=f"^{name} .*{message}"):
        model(sample(config, 5, placeholder, placeholder), **{name: pixels})


@pytest.mark.parametrize("placeholders", [1, 3], ids=["fewer", "more"])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_mismatch_of_placeholders_and_frames_is_refused(model, config, kind, placeholders):
    name = {"image": "pixel_values", "video": "pixel_values_videos"}[kind]
    message = f"has {4 * placeholders} {kind} placeholders, but 2 frames of 4 tokens need 8"
    with pytest.raises(ValueError, match=message):
        model(sample(config, 5, *[kind] * placeholders), **{name: random_pixels(2)})


def test_model_takes_either_ids_or_embeddings(model, config):
    input_ids = sample(config, 5)
    for inputs in ({}, dict(input_ids=input_ids, inputs_embeds=model.get_input_embeddings()(input_ids))):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            model(**inputs)


@pytest.mark.parametrize("tokens_per_pass", [2, 3, 8, 19])
def test_tokens_per_pass_limits_the_tokens_of_a_pass(double, in_double, monkeypatch, tokens_per_pass):
    ids = torch.randint(2, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    prefix = dict(input_ids=ids[:, :9], attention_mask=mask[:, :9])
    with torch.no_grad():
        whole = double(ids, attention_mask=mask, use_cache=True)
        state = double(**prefix, use_cache=True).cache_params
        monkeypatch.setattr(double.config, "tokens_per_pass", tokens_per_pass)
        lengths = []
        handle = double.model.language_model.layers[0].register_forward_pre_hook(
            lambda module, args: lengths.append(args[0].shape[1])
        )
        passes = double(ids, attention_mask=mask, use_cache=True)
        handle.remove()
        continued = double(ids[:, 9:], cache_params=state, use_cache=True)
        assert double(ids).cache_params is not None and double(ids, use_cache=False).cache_params is None
    assert sum(lengths) == 20 and max(lengths) <= tokens_per_pass + 1
    for result, expected in [(passes, whole.logits), (continued, whole.logits[:, 9:])]:
        assert_close(result.logits, expected, **EXACT)
        for layer, other in zip(result.cache_params.layers, whole.cache_params.layers, strict=True):
            assert_close(layer.conv_states[0], other.conv_states[0], **EXACT)
            assert_close(layer.recurrent_states[0], other.recurrent_states[0], **EXACT)


def test_tokens_per_pass_does_not_change_the_answer(double, monkeypatch):
    ids = torch.randint(2, 300, (1, 40), generator=torch.Generator().manual_seed(0))
    expected = double.generate(ids, max_new_tokens=5, do_sample=False)
    monkeypatch.setattr(double.config, "tokens_per_pass", 8)
    assert torch.equal(double.generate(ids, max_new_tokens=5, do_sample=False), expected)


def test_layers_with_the_same_layer_idx_are_refused(double):
    model = copy.deepcopy(double)
    layers = model.model.language_model.layers
    layers.append(copy.deepcopy(layers[0]))
    model.config.tokens_per_pass = 8
    with pytest.raises(ValueError, match=r"layers\.0 and layers\.\d both keep their state under layer_idx 0"):
        with torch.no_grad():
            model(torch.arange(2, 22)[None])
