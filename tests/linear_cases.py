"""Cases of linear attention that several files test."""

from linear_harness import DELTA, LinearCase

from fastattn.testing import variants

MAPS = ("identity", "relu", "elu1", "taylor1", "taylor2")
DECAYS = (None, "h", "bhl", "bhld")
HEADS = (
    (4, 4, 4),
    (4, 2, 2),
    (4, 1, 1),
    (2, 2, 4),
    (1, 1, 4),
    (4, 2, 4),
    (2, 4, 2),
    (1, 4, 4),
    (4, 4, 1),
    (8, 2, 4),
    (2, 8, 4),
)

FEATURES = [
    LinearCase(feature_map=name, normalize=divided, decay=decay, state=state)
    for name in MAPS
    for divided in (False, True)
    for decay, state in ((None, False), ("bhl", True))
    if name != "identity" or not divided
] + [LinearCase(feature_map=name, decay="bhld", state=True) for name in ("identity", "relu", "elu1")]
# An identity map may divide too, where keys and queries were mapped before the call (`positive`).
DECAYED = [LinearCase(feature_map=name, decay=decay) for name in ("identity", "elu1") for decay in DECAYS]
DELTAS = [LinearCase(**DELTA, decay=decay, state=state) for decay in DECAYS for state in (False, True)]
WHOLE = [
    LinearCase(causal=False, feature_map=name, normalize=divided, L=21, Lk=39, key_mask=masked, state=state)
    for name, divided in (("identity", False), ("relu", True), ("elu1", True), ("elu1", False), ("taylor1", True), ("taylor2", True))
    for masked, state in ((False, False), (True, True))
]  # fmt: skip
PACKED = [
    LinearCase(B=1, lengths=lengths, state=state, **options)
    for lengths, state in (((13, 0, 1, 25), True), ((0, 0, 7, 20, 0), False))
    for options in (
        {}, {"decay": "bhl"}, {"decay": "h", "feature_map": "identity"}, {"decay": "bhld", "feature_map": "relu"},
        DELTA, {**DELTA, "decay": "bhl"}, {"causal": False}, {"causal": False, "key_mask": True}, {"feature_map": "taylor2"},
    )
]  # fmt: skip
GROUPED = [
    LinearCase(Hq=Hq, Hk=Hk, Hv=Hv, L=20, D=8, **options)
    for Hq, Hk, Hv in HEADS
    for options in ({"decay": "bhl", "state": True}, {**DELTA, "decay": "h", "state": True}, {"causal": False, "Lk": 9})
]  # fmt: skip
LENGTHS = [
    LinearCase(B=1, L=L, **options)
    for L in (1, 2, 15, 63, 64, 65, 130, 200)
    for options in ({}, {"decay": "bhld", "feature_map": "identity"}, {**DELTA, "decay": "bhl", "state": True})
]  # fmt: skip
SIZES = [
    LinearCase(B=1, L=19, D=D, Dv=Dv, decay="bhl", **options)
    for D, Dv in ((1, 1), (3, 5), (8, 40), (20, 72), (33, 17), (64, 8), (100, 130), (256, 256))
    for options in ({}, DELTA, {"feature_map": "identity", "causal": True})
] + [LinearCase(B=1, L=9, D=D, Dv=Dv, feature_map=name) for D, Dv in ((1, 1), (5, 3), (17, 33)) for name in MAPS[3:]]  # fmt: skip
SCALED = variants(LinearCase(decay="bhl"), scale=(1e-3, 1.0, 7.5)) + variants(
    LinearCase(feature_map="identity", decay="bhl"), scale=(0.0, -0.5, 1e-30, 3.0)
)
VALUES = list(dict.fromkeys(FEATURES + DECAYED + DELTAS + WHOLE + PACKED))
