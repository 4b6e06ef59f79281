import pytest
import torch

from quail_kernels import FORMATS, fake_quant, get_format

# As the CUDA sources of bitsandbytes spell them.
NF4_THRESHOLDS = [
    *(-0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544),
    *(-0.23460740596055984, -0.13791173323988914, -0.045525018125772476, 0.03979014977812767),
    *(0.1202552504837513, 0.2035212516784668, 0.2920137718319893, 0.3893125355243683),
    *(0.5016634166240692, 0.6427869200706482, 0.8614784181118011),
]


def test_nf4_thresholds_are_those_of_the_cuda_build():
    assert torch.equal(torch.tensor(get_format("bnb-nf4").thresholds), torch.tensor(NF4_THRESHOLDS))


def test_fp4_has_one_bucket_for_both_zeros():
    fp4 = get_format("bnb-fp4")
    zeros = [rank for rank, level in enumerate(fp4.levels) if level == 0]
    assert [fp4.codes[rank] for rank in zeros] == [0, 8]
    assert len({fp4.buckets[rank] for rank in zeros}) == 1
    assert sorted(set(fp4.buckets)) == list(range(15))


def test_group_size_in_the_name_or_beside_it():
    assert get_format("ct-int4-sym@64") == get_format("ct-int4-sym", 64) == get_format("ct-int4-sym@64", 64)
    assert str(get_format("bnb-nf4@128")) == "bnb-nf4@128"
    assert {name: get_format(name).group_size for name in FORMATS} == {
        "bnb-nf4": 64,
        "bnb-fp4": 64,
        "ct-int4-sym": 128,
        "minmax-int4": None,
        "gguf-q4_0": 32,
        "gguf-q4_1": 32,
        "mxfp4": 32,
        "mxfp4-rceil": 32,
        "gguf-mxfp4": 32,
        "nvfp4": 16,
    }


@pytest.mark.parametrize(
    ("format", "group_size", "says"),
    [
        ("nf4", None, "expected one of bnb-nf4, bnb-fp4, ct-int4-sym, minmax-int4.*got 'nf4'"),
        ("bnb-nf4@", None, "expected a number after @.*got 'bnb-nf4@'"),
        ("bnb-nf4@-64", None, "expected a number after @"),
        ("bnb-nf4@64", 128, "expected 64.*got 128"),
        ("bnb-nf4", 48, "expected one of 32, 64, 128, 256, 512, 1024, 2048, 4096 for bnb-nf4; got 48"),
        ("ct-int4-sym", 100, "expected a multiple of 8 from 8 to 4096 for ct-int4-sym; got 100"),
        ("minmax-int4", 0, "expected a multiple of 8 from 8 to 4096 for minmax-int4; got 0"),
    ],
)
def test_what_a_format_refuses(format, group_size, says):
    with pytest.raises(ValueError, match=says) as caught:
        fake_quant(torch.zeros(128), format, group_size)
    assert "\n" not in str(caught.value)
