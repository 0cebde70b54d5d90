"""The subjects: every kind of model that PEFT's own tests adapt, and some that they do not."""

from dataclasses import replace

from parity import models
from parity.cases import TRANSPOSED, four_bit, pictures
from parity.matrix import language_models, toy_modules
from parity.matrix.decoders import DECODERS, LLAMA
from parity.matrix.subjects import (
    BATCH_NORMS,
    Subject,
    drawn,
    few_tokens,
    images,
    larger_images,
    pairs,
    speech,
)

CLASSIFIER, ENCODER, BOTH = "classifiers", "encoders", "encoder-decoders"
VISION, PLAIN, STORED = "vision", "plain modules", "quantized"
BERT = Subject(
    name="bert",
    kind=CLASSIFIER,
    build=models.bert,
    targets=("query", "value"),
    regex=r".*layer\.1\..*\.(key|dense)",
    inputs=few_tokens,
    excluded="bert.encoder.layer.0.attention.self.query",
    blocks="layer",
    embedding="word_embeddings",
    saved="classifier",
    task="SEQ_CLS",
)
CLASSIFIERS = (
    replace(BERT, is_thorough=True),
    replace(
        LLAMA,
        name="llama, score",
        kind=CLASSIFIER,
        build=language_models.llama_classifier,
        inputs=few_tokens,
        head="",
        saved="score",
        task="SEQ_CLS",
    ),
    replace(
        BERT,
        name="distilbert, tokens",
        build=language_models.distilbert,
        targets=("q_lin", "lin1"),
        regex=r".*layer\.1\..*\.(v_lin|lin2)",
        excluded="distilbert.transformer.layer.0.attention.q_lin",
        task="TOKEN_CLS",
    ),
)
ENCODERS = (
    replace(
        BERT,
        name="roberta",
        kind=ENCODER,
        build=language_models.roberta,
        excluded="roberta.encoder.layer.0.attention.self.query",
        saved="lm_head",
        head="decoder",
        is_tied=True,
        task="",
    ),
    replace(
        BERT,
        name="deberta-v2",
        kind=ENCODER,
        build=language_models.deberta,
        targets=("query_proj", "value_proj"),
        regex=r".*layer\.1\..*\.(pos_key_proj|dense)",
        excluded="encoder.layer.0.attention.self.query_proj",
        saved="LayerNorm",
        task="",
    ),
)
T5 = Subject(
    name="t5",
    kind=BOTH,
    build=language_models.t5,
    targets=("q", "wi"),
    regex=r".*block\.1\..*\.(v|wo)",
    inputs=pairs,
    excluded="encoder.block.0.layer.0.SelfAttention.q",
    blocks="block",
    embedding="shared",
    head="lm_head",
    saved="final_layer_norm",
    is_tied=True,
    task="SEQ_2_SEQ_LM",
)
BART = replace(
    T5,
    name="bart",
    build=language_models.bart,
    targets=("q_proj", "fc1"),
    regex=r".*layers\.1\..*\.(v_proj|fc2)",
    excluded="model.encoder.layers.0.fc1",
    blocks="layers",
    saved="layernorm_embedding",
)
ENCODER_DECODERS = (
    replace(T5, is_thorough=True),
    BART,
    replace(
        BART,
        name="whisper",
        build=language_models.whisper,
        inputs=speech,
        embedding="embed_tokens",
        head="proj_out",
        saved="layer_norm",
        task="",
    ),
)
VIT = Subject(
    name="vit",
    kind=VISION,
    build=language_models.vit,
    targets=("q_proj", "fc1"),
    regex=r".*layers\.1\..*\.(v_proj|fc2)",
    inputs=images,
    excluded="vit.layers.0.mlp.fc1",
    blocks="layers",
    saved="classifier",
)
CONVOLUTIONS = Subject(
    name="conv2d",
    kind=VISION,
    build=models.Pictures,
    targets=("first", "second", "proj_out"),
    regex=r"(first|head)",
    inputs=pictures,
    excluded="second",
    saved="head",
)
GROUPS = replace(
    CONVOLUTIONS,
    name="conv2d, groups",
    build=toy_modules.Grouped,
    targets=("conv0", "conv1"),
    regex=r"(conv0|head)",
    inputs=drawn(2, 4, 6, 6),
    excluded="conv1",
)
VISION_MODELS = (
    VIT,
    replace(VIT, name="vit, patches", targets=("projection", "q_proj"), excluded="", blocks=""),
    replace(
        CONVOLUTIONS,
        name="resnet",
        build=language_models.resnet,
        targets=("convolution",),
        regex=r".*\.stages\.0\..*convolution",
        inputs=larger_images,
        excluded="resnet.embedder.embedder.convolution",
        saved="normalization",
        tolerance=BATCH_NORMS,
    ),
    replace(CONVOLUTIONS, is_thorough=True),
    GROUPS,
    replace(GROUPS, name="conv2d, padding", build=toy_modules.Padded),
    replace(GROUPS, name="conv1d", build=toy_modules.OneDimension, inputs=drawn(2, 4, 9)),
    replace(GROUPS, name="conv3d", build=toy_modules.ThreeDimensions, inputs=drawn(2, 2, 4, 4, 4)),
)
PERCEPTRON = Subject(
    name="perceptron",
    kind=PLAIN,
    build=toy_modules.Perceptron,
    targets=("lin0", "lin1"),
    regex=r"lin\d",
    inputs=drawn(2, 5, toy_modules.WIDTH),
    excluded="lin0",
    saved="norm",
    parameters=("lin0.weight",),
)
TRANSPOSED_TOY = replace(
    PERCEPTRON,
    name="embedding and Conv1D",
    build=toy_modules.Transposed,
    targets=("conv1d",),
    regex=r"conv1d|lin",
    inputs=few_tokens,
    excluded="",
    embedding="emb",
    saved="lin",
    parameters=(),
    peft=TRANSPOSED,
)
ATTENTION = replace(
    PERCEPTRON,
    name="MultiheadAttention",
    build=toy_modules.Attention,
    targets=("mha",),
    regex=r"mha|lin",
    excluded="",
    saved="lin",
    parameters=("mha.in_proj_weight",),
)
PLAIN_MODULES = (
    replace(PERCEPTRON, is_thorough=True),
    replace(TRANSPOSED_TOY, is_thorough=True),
    ATTENTION,
    replace(ATTENTION, name="MultiheadAttention, out_proj", targets=("out_proj", "lin")),
    replace(
        ATTENTION,
        name="TransformerEncoder",
        build=toy_modules.TorchEncoder,
        targets=("linear1", "linear2"),
        regex=r".*layers\.1\.linear\d",
        excluded="encoder.layers.0.linear1",
        blocks="layers",
        saved="head",
        parameters=("linear1.weight",),
    ),
    replace(
        ATTENTION,
        name="bare parameters",
        build=toy_modules.BareParameters,
        targets=("lin",),
        regex="lin",
        parameters=("matrix", "stack"),
        saved="lin",
    ),
    replace(
        ATTENTION,
        name="nested lists",
        build=toy_modules.NestedLists,
        targets=("layers.0.0", "up"),
        regex=r"layers\.1\..*|out\.2",
        excluded="layers.0.1.up",
        saved="norm",
        parameters=("layers.0.0.weight",),
    ),
    replace(
        ATTENTION,
        name="ParameterList",
        build=toy_modules.Listed,
        targets=("lin0", "lin1"),
        regex=r"lin\d",
        excluded="lin0",
        saved="scales",
        parameters=("scales.0",),
    ),
    replace(
        ATTENTION,
        name="tied modules",
        build=toy_modules.Tied,
        targets=("lin",),
        regex="lin",
        inputs=few_tokens,
        embedding="emb",
        head="head",
        saved="head",
        parameters=(),
        is_tied=True,
    ),
)
QUANTIZED = (
    replace(
        LLAMA,
        name="llama in NF4",
        kind=STORED,
        build=four_bit("nf4", double=True),
        parameters=(),
    ),
)
SUBJECTS = (
    *DECODERS,
    *CLASSIFIERS,
    *ENCODERS,
    *ENCODER_DECODERS,
    *VISION_MODELS,
    *PLAIN_MODULES,
    *QUANTIZED,
)
