"""The data sets that papers use: what they are, where they come from, how they lie on disk."""

from __future__ import annotations

from dataclasses import dataclass

from reprise.data.checks import (
    Check,
    always,
    check_bccd,
    check_cifar10,
    check_wmt14,
    checksums,
    file_counts,
    line_counts,
)
from reprise.data.download import Download


@dataclass(frozen=True)
class DataEntry:
    """One data set.

    Attributes:
        name: as in `reprise data fetch NAME` and `data=NAME`.
        what, size, licence, source, layout: for people; the layout is below the data root.
        check: (data root) to counts of what is there; raises DataError for what is missing or damaged.
        downloads: what `fetch` brings; each has its checksum.
        instructions: what to do by hand where there is nothing to download.
        built_in: always there, nothing to fetch.
    """

    name: str
    what: str
    size: str
    licence: str
    source: str
    layout: str
    check: Check
    downloads: tuple[Download, ...] = ()
    instructions: str | None = None
    built_in: bool = False


_GITHUB = "https://raw.githubusercontent.com"
_PLANETOID = f"{_GITHUB}/kimiyoung/planetoid/af6abf468a772cc055bec88c52e4d6f51b7c37e3/data"
_MULTI30K = f"{_GITHUB}/multi30k/dataset/a3d2e0d26b56f3846f66a952536ffed4e401d05a/data/task1/raw"
_CONVE = f"{_GITHUB}/TimDettmers/ConvE/f3c0eb286025410fa5b4c04696c918264163d0ca"
_OMNIGLOT = f"{_GITHUB}/brendenlake/omniglot/057f034baf2ecb8530bc5710e5a23584d2a519cc/python"
_BCCD_COMMIT = "d272fb14cdff6e473fafeeeba32aba5f560e9e43"

_CORA = {
    "x": "23cfa55d91c6f624233f5eb7b6e3f141f1bd2b2ae39608a63cf5d084bb27baab",
    "y": "94465c14eb53e04ca262198dcbb2521ee8af60fb3f3d546cd6ca24a511b0e7d1",
    "tx": "b9afbaa4a400df991f6f02ef677e1e44da55ffc04801fd02f9e673987829226a",
    "ty": "41f5ac76596a1699cc33f53084a2419e92961c42bb75f36fc38e616d348532ad",
    "allx": "9419ba2f26f5c35243db64aba110e0f35a04851609e0dc5433450676ca6b8543",
    "ally": "2b998f5cc7fedc86e7f97ca2498f47a1ffc1462c29e2d578b23bf3f62b6e7d71",
    "graph": "58f13302f39dde8852dad6fe6d15b89b077b6d7f837626bce671ef80344b383d",
    "test.index": "297ce89af2b51a6a194181c7dbe1796c6a1cf9cd9349a88383b1b1e227867875",
}
_MULTI30K_FILES = {
    "train.en": "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f",
    "train.de": "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6",
    "val.en": "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28",
    "val.de": "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a",
    "test_2016_flickr.en": "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9",
    "test_2016_flickr.de": "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8",
    "test_2017_flickr.en": "76a444ee25172e72695cddb13ae4a3bda59430617be88e0bb46b60504f054074",
    "test_2017_flickr.de": "a2c89666db00c495cd8513b9d708d5a3acc205d7de312ef2bf5fb7ebc1540aee",
}

_MULTI30K_PARTS = tuple(
    Download(f"{_MULTI30K}/{name}.gz", f"sha256:{value}", place=f"multi30k/{name}.gz")
    for name, value in _MULTI30K_FILES.items()
)
_CLINC150_PARTS = (
    Download(
        f"{_GITHUB}/clinc/oos-eval/828f8093932c8fe6ca7936c3d2e52903b1c523de/data/data_full.json",
        "sha256:36923c3705a59e08fe9c3883d8bc2dd966ef93e22cb78ac41171782a698d56e0",
        place="clinc150/data_full.json",
    ),
)
_CORA_PARTS = tuple(
    Download(f"{_PLANETOID}/ind.cora.{name}", f"sha256:{value}", place=f"cora/raw/ind.cora.{name}")
    for name, value in _CORA.items()
)
_SHAKESPEARE_PARTS = (
    Download(
        f"{_GITHUB}/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/input.txt",
        "sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        place="tiny_shakespeare/input.txt",
    ),
)
_CLIP_BPE_PARTS = (
    Download(
        f"{_GITHUB}/openai/CLIP/d05afc436d78f1c48dc0dbf8e5980a9d471f35f6/clip/bpe_simple_vocab_16e6.txt.gz",
        "sha256:924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a",
        place="clip_bpe/bpe_simple_vocab_16e6.txt.gz",
    ),
)
ENTRIES = (
    DataEntry(
        name="digits",
        what="1,797 handwritten digits of 8x8 pixels, 10 classes",
        size="in scikit-learn",
        licence="CC BY 4.0",
        source="UCI Optical Recognition of Handwritten Digits, as in scikit-learn",
        layout="in the package scikit-learn",
        check=always,
        built_in=True,
    ),
    DataEntry(
        name="shapes",
        what="rendered scenes of simple shapes: boxes, masks, captions, video with flow",
        size="rendered on demand (about 16 KB a scene of 64x64)",
        licence="Apache-2.0",
        source="reprise.data.shapes",
        layout="<cache>/shapes/",
        check=always,
        built_in=True,
    ),
    DataEntry(
        name="cifar10",
        what="60,000 photographs of 32x32 pixels, 10 classes",
        size="170 MB",
        licence="not stated by the authors; for research",
        source="https://www.cs.toronto.edu/~kriz/cifar.html (Krizhevsky 2009)",
        layout="cifar-10-batches-py/data_batch_{1..5}, test_batch; or cifar10/{train,test}/<class>/*.jpg",
        check=check_cifar10,
        downloads=(
            Download(
                "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
                "md5:c58f30108f718f92721af3b95e74349a",
                place="cifar-10-batches-py",
                member="cifar-10-batches-py",
            ),
        ),
    ),
    DataEntry(
        name="bccd",
        what="364 microscope images of 640x480 pixels with boxes around red and white blood cells and platelets",
        size="10 MB",
        licence="MIT",
        source="https://github.com/Shenggan/BCCD_Dataset",
        layout="bccd/{Annotations/*.xml, JPEGImages/*.jpg, ImageSets/Main/{train,val,test}.txt}",
        check=check_bccd,
        downloads=(
            Download(
                f"https://github.com/Shenggan/BCCD_Dataset/archive/{_BCCD_COMMIT}.zip",
                None,  # made on request, so its bytes may change; the files in it have a checksum instead
                place="bccd",
                member=f"BCCD_Dataset-{_BCCD_COMMIT}/BCCD",
                tree="0bb479c7ed1c5f1e410e8e3c1b9a1565ee37feeb8e6375f6c93534deebf720c1",
            ),
        ),
    ),
    DataEntry(
        name="multi30k",
        what="30,000 image captions in English and German (task 1), raw sentences",
        size="1.3 MB",
        licence="for research, see the repository",
        source="https://github.com/multi30k/dataset (Elliott et al. 2016)",
        layout="multi30k/{train,val,test_2016_flickr,test_2017_flickr}.{en,de}.gz",
        check=checksums("multi30k", _MULTI30K_PARTS),
        downloads=_MULTI30K_PARTS,
    ),
    DataEntry(
        name="clinc150",
        what="22,500 questions to an assistant in 150 intents, and 1,200 out of scope",
        size="2.5 MB",
        licence="CC BY 3.0",
        source="https://github.com/clinc/oos-eval (Larson et al. 2019)",
        layout="clinc150/data_full.json",
        check=checksums("clinc150", _CLINC150_PARTS),
        downloads=_CLINC150_PARTS,
    ),
    DataEntry(
        name="cora",
        what="citation graph of 2,708 papers in 7 classes, planetoid split",
        size="0.6 MB",
        licence="MIT",
        source="https://github.com/kimiyoung/planetoid (Yang et al. 2016)",
        layout="cora/raw/ind.cora.{x,y,tx,ty,allx,ally,graph,test.index}",
        check=checksums("cora", _CORA_PARTS),
        downloads=_CORA_PARTS,
    ),
    DataEntry(
        name="wn18rr",
        what="knowledge graph of WordNet: 93,003 triples, 40,943 entities, 11 relations",
        size="0.9 MB",
        licence="MIT",
        source="https://github.com/TimDettmers/ConvE (Dettmers et al. 2018)",
        layout="wn18rr/{train,valid,test}.txt",
        check=line_counts("wn18rr", {"train.txt": 86_835, "valid.txt": 3034, "test.txt": 3134}),
        downloads=(
            Download(
                f"{_CONVE}/WN18RR.tar.gz",
                "sha256:1eb9152f804c140d163462c0d49f65e5a0b30ab5fbb375c5e3353c11a6249060",
                place="wn18rr",
                member="",
            ),
        ),
    ),
    DataEntry(
        name="kinship",
        what="knowledge graph of family relations: 10,686 triples",
        size="43 KB",
        licence="MIT",
        source="https://github.com/TimDettmers/ConvE",
        layout="kinship/{train,valid,test}.txt",
        check=line_counts("kinship", {"train.txt": 8544, "valid.txt": 1068, "test.txt": 1074}),
        downloads=(
            Download(
                f"{_CONVE}/kinship.tar.gz",
                "sha256:a3cb9ca67213eb38133aebc12901195e283d844ebd59f1a6cbf2d4fa12ced4e6",
                place="kinship",
                member="",
            ),
        ),
    ),
    DataEntry(
        name="omniglot",
        what="handwritten characters of 5 alphabets (the small background set 1), 20 drawers each, 105x105 pixels",
        size="1.3 MB",
        licence="MIT",
        source="https://github.com/brendenlake/omniglot (Lake et al. 2015)",
        layout="omniglot/images_background_small1/<alphabet>/<character>/*.png",
        check=file_counts("omniglot", {"images_background_small1/*/*/*.png": 2720}),
        downloads=(
            Download(
                f"{_OMNIGLOT}/images_background_small1.zip",
                "sha256:f38eb80f801274ac2b4dff5b24289016bfaba4a7d5bb50deebf27104ad6cb8a4",
                place="omniglot/images_background_small1",
                member="images_background_small1",
            ),
        ),
    ),
    DataEntry(
        name="noto_emoji",
        what="3,543 emoji of 72x72 pixels with short names in English, German and French",
        size="11 MB",
        licence="SIL OFL 1.1 (pictures), Unicode licence (names)",
        source="https://github.com/googlefonts/noto-emoji, Unicode CLDR",
        layout="noto_emoji/{images/*.png, captions.tsv (file, codepoints, skin_tone, en, de, fr)}",
        check=file_counts("noto_emoji", {"images/*.png": 3543, "captions.tsv": 1}, at_least=True),
        instructions="copy png/72 of googlefonts/noto-emoji to <data root>/noto_emoji/images, and write captions.tsv "
        "(tab-separated: file, codepoints, skin_tone, en, de, fr) with the CLDR short names (annotations `tts`)",
    ),
    DataEntry(
        name="tiny_shakespeare",
        what="40,000 lines of Shakespeare",
        size="1.1 MB",
        licence="public domain",
        source="https://github.com/karpathy/char-rnn",
        layout="tiny_shakespeare/input.txt",
        check=checksums("tiny_shakespeare", _SHAKESPEARE_PARTS),
        downloads=_SHAKESPEARE_PARTS,
    ),
    DataEntry(
        name="imagenet",
        what="ILSVRC 2012: 1,281,167 training and 50,000 validation photographs, 1,000 classes",
        size="150 GB",
        licence="ImageNet terms of access (research)",
        source="https://image-net.org/challenges/LSVRC/2012",
        layout="imagenet/{train,val}/<wnid>/*.JPEG",
        check=file_counts("imagenet", {"train/n*": 1000, "val/n*": 1000}),
        instructions="log in at image-net.org, download ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar; unpack "
        "them to <data root>/imagenet/{train,val}/<wnid>/*.JPEG",
    ),
    DataEntry(
        name="coco",
        what="COCO 2017: 118,287 training and 5,000 validation photographs, boxes and masks of 80 classes",
        size="20 GB",
        licence="CC BY 4.0 (annotations); Flickr terms (images)",
        source="https://cocodataset.org (Lin et al. 2014)",
        layout="coco/{train2017,val2017}/*.jpg, coco/annotations/instances_{train,val}2017.json",
        check=file_counts(
            "coco",
            {
                "train2017/*.jpg": 118_287,
                "val2017/*.jpg": 5000,
                "annotations/instances_train2017.json": 1,
                "annotations/instances_val2017.json": 1,
            },
        ),
        downloads=tuple(
            Download(f"http://images.cocodataset.org/{path}.zip", f"md5:{value}", place=f"coco/{member}", member=member)
            for path, value, member in (
                ("zips/train2017", "cced6f7f71b7629ddf16f17bbcfab6b2", "train2017"),
                ("zips/val2017", "442b8da7639aecaf257c1dceb8ba8c80", "val2017"),
                ("annotations/annotations_trainval2017", "f4bbac642086de4f52a3fdda2de5fa2c", "annotations"),
            )
        ),
    ),
    DataEntry(
        name="sequences",
        what="strings of random symbols to copy, reverse, sort or look up",
        size="made on demand",
        licence="Apache-2.0",
        source="reprise.data.sequences",
        layout="in memory",
        check=always,
        built_in=True,
    ),
    DataEntry(
        name="wmt14",
        what="WMT 2014 translation: about 4.5 million English-German and 36 million English-French sentence pairs",
        size="1.5 GB (en-de), 11 GB (en-fr)",
        licence="terms of the corpora (research)",
        source="https://www.statmt.org/wmt14/translation-task.html",
        layout="wmt14/{en-de,en-fr}/{train,newstest2013,newstest2014}.{en,de|fr}, one sentence a line",
        check=check_wmt14,
        instructions="from https://www.statmt.org/wmt14/translation-task.html download Europarl v7, Common Crawl and "
        "News Commentary (en-fr: also the UN corpus and the 10^9 corpus), concatenate them in the same order to "
        "<data root>/wmt14/en-de/train.en and train.de, drop pairs with an empty side, and put newstest2013 (dev.tgz) "
        "and the full newstest2014 (test-full.tgz), without their SGML tags, beside them; for French so in en-fr/",
    ),
    DataEntry(
        name="clip_bpe",
        what="the byte-pair merges of the released CLIP models (48,894 of them are used)",
        size="1.4 MB",
        licence="MIT",
        source="https://github.com/openai/CLIP; also in the wheel of open_clip_torch on PyPI",
        layout="clip_bpe/bpe_simple_vocab_16e6.txt.gz",
        check=checksums("clip_bpe", _CLIP_BPE_PARTS),
        downloads=_CLIP_BPE_PARTS,
    ),
    DataEntry(
        name="image_text",
        what="pictures with captions of your own, in place of WIT (400 million pairs, never released)",
        size="as you like; CC3M is about 100 GB",
        licence="that of the pairs",
        source="e.g. Conceptual Captions (https://ai.google.com/research/ConceptualCaptions)",
        layout="image_text/{images/..., captions.tsv (file, caption)}",
        check=file_counts("image_text", {"captions.tsv": 1, "images": 1}),
        instructions="put pictures below <data root>/image_text/images and a tab-separated table with the columns file "
        "and caption at <data root>/image_text/captions.tsv; zero-shot tests also need imagenet/val and clip_bpe",
    ),
    DataEntry(
        name="glyphs",
        what="rendered signs of curved strokes, in as many classes and hands as wanted",
        size="rendered on demand (3 MB)",
        licence="Apache-2.0",
        source="reprise.data.glyphs",
        layout="<cache>/glyphs/",
        check=always,
        built_in=True,
    ),
    DataEntry(
        name="mini_imagenet",
        what="few-shot photographs: 64 base, 16 validation and 20 novel classes of ImageNet, 600 images each",
        size="5 GB at 480x480 pixels",
        licence="ImageNet terms of access (research)",
        source="Vinyals et al. 2016, split of Ravi and Larochelle 2017",
        layout="mini_imagenet/{train,val,test}/<class>/*",
        check=file_counts("mini_imagenet", {"train/*": 64, "val/*": 16, "test/*": 20}),
        instructions="get ILSVRC 2012 from image-net.org and the lists of Ravi and Larochelle "
        "(https://github.com/twitter-research/meta-learning-lstm, data/miniImagenet); copy the listed images to "
        "<data root>/mini_imagenet/{train,val,test}/<class>/",
    ),
)
