"""Every set of the catalog, loaded from a tiny copy in the layout of its hub, of CoOp, or of a folder a class."""

import json
import warnings

import datasets
import pytest

from advtune.data import Split, load_task, named
from advtune.data.catalog import catalog, entry, names
from advtune.data.coop import open_coop
from advtune.data.fewshot import named_part, select
from advtune.data.named import places
from advtune.data.sources import normal
from advtune.errors import UserError

CATALOG = catalog()
WANTED = [
    "imagenet", "imagenet-v2", "imagenet-r", "imagenet-a", "imagenet-sketch", "objectnet", "tinyimagenet",
    "cifar10", "cifar100", "stl10", "caltech101", "caltech256", "oxford-pets", "stanford-cars", "flowers102",
    "food101", "fgvc-aircraft", "sun397", "dtd", "eurosat", "ucf101", "pcam", "country211", "hateful-memes",
    "fashion-mnist", "mnist", "svhn", "grocery", "fashion-mnist-mini",
]  # fmt: skip
LAYOUTS = {  # the hub's splits, image and label columns, where they are not train, test, image, label
    "imagenet": "train validation image label", "imagenet-v2": "test webp cls", "imagenet-r": "test jpg cls",
    "imagenet-a": "test jpg cls", "imagenet-sketch": "test jpg cls", "objectnet": "test png cls",
    "tinyimagenet": "train valid image label", "cifar10": "train test img label",
    "cifar100": "train test img fine_label", "caltech101": "train image label",
    "caltech256": "train validation test image text", "flowers102": "train validation test image label",
    "food101": "train validation image label", "fgvc-aircraft": "train test webp cls",
    "pcam": "train valid test image label",
    "country211": "train test webp cls", "svhn": "train test extra image label",
}  # fmt: skip
COOP = [name for name in CATALOG if CATALOG[name]["coop"]]


@pytest.fixture(autouse=True)
def own_data(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setenv("ADVTUNE_DATA", str(tmp_path / "own"))
    return tmp_path / "own"


def labels_of(name):
    """How a hub set holds its labels: their type, and a value for each of the catalog's classes."""
    facts = CATALOG[name]
    count = len(facts["classes"])
    if name == "pcam":
        return datasets.Value("bool"), [False, True]
    if facts["label"]:
        return datasets.Value("string"), facts["hub_classes"]
    if facts["numbered"] and not facts["by_index"]:
        return datasets.Value("int64"), list(range(count))
    shown = facts["hub_classes"] or facts["classes"]
    order = sorted(shown)  # the hub's order is not the catalog's
    return datasets.ClassLabel(names=order), [order.index(text) for text in shown]


def content(split, i):
    return f"{split} {i}".encode()  # nothing is decoded when a set is loaded


def hub_copy(name, root=None):
    """One image a class in every split, the last class first: the splits, also written below `root`."""
    *splits, image, label = LAYOUTS.get(name, "train test image label").split()
    kind, values = labels_of(name)
    features = {image: datasets.Image(), label: kind}
    backwards = range(len(values))[::-1]
    made = {}
    for split in splits:
        cells = {
            image: [{"bytes": content(split, i), "path": None} for i in backwards],
            label: [values[i] for i in backwards],
        }
        if label == "fine_label":  # cifar100 has two labels, caltech256 a number beside the text
            cells["coarse_label"] = [i % 2 for i in backwards]
            features["coarse_label"] = datasets.ClassLabel(names=["one", "two"])
        if label == "text":
            cells["label"] = [(7 * i) % 256 for i in backwards]
            features["label"] = datasets.Value("int64")
        made[split] = datasets.Dataset.from_dict(cells, features=datasets.Features(features))
        if root is not None:
            (root / name).mkdir(parents=True, exist_ok=True)
            made[split].to_parquet(root / name / f"{split}.parquet")
    return made


def check_labels(task, name, splits):
    """Every image has the text of the class it was written for."""
    assert task.classes == tuple(CATALOG[name]["classes"])
    assert len(task.parts) == len(splits)
    for part, split in splits.items():
        records = task.parts[part]
        assert sorted(records.labels) == list(range(len(task.classes)))
        assert [records.read(i) for i in range(len(records))] == [content(split, label) for label in records.labels]


def test_the_catalog_holds_what_was_agreed():
    assert set(names()) == set(WANTED) == set(CATALOG)
    with pytest.raises(KeyError):
        entry("../catalog")


@pytest.mark.parametrize("name", names())
def test_entry_is_sound(name):
    facts = CATALOG[name]
    classes = facts["classes"]
    assert len({" ".join(c.split()).casefold() for c in classes}) == len(classes) > 1
    assert all(c == " ".join(c.split()) and not set("{}") & set(c) for c in classes)
    assert facts["template"].count("{}") == 1
    assert not set("{}") & set(facts["template"].replace("{}", ""))
    assert facts["title"]
    assert len(facts["licence"]) > 10
    for table in (facts["hub_classes"], facts["folders"]):
        assert table is None or len({normal(text) for text in table}) == len(table) == len(classes)
    for counts in (facts["counts"], (facts["coop"] or {}).get("counts", {})):
        assert set(counts) <= {"train", "val", "test"}
        assert all(type(n) is int and n >= len(classes) for n in counts.values())
    assert facts["counts"] or facts["coop"] or facts["total"] or name == "grocery"
    assert facts["total"] is None or facts["coop"] is None or facts["total"] == sum(facts["coop"]["counts"].values())
    assert facts["hub"] is None or facts["hub"].partition(":")[0].count("/") == 1
    shared = {"title", "template", "licence", "classes"}
    assert set(facts) == shared | set(CATALOG["grocery"])


def test_imagenet_names_that_are_traps():
    texts, folders = CATALOG["imagenet"]["classes"], CATALOG["imagenet"]["folders"]
    at = dict(zip(folders, texts, strict=True))
    assert folders == sorted(folders)
    assert (at["n02012849"], at["n03126707"]) == ("crane bird", "construction crane")
    assert (at["n02113186"], at["n02963159"]) == ("Cardigan Welsh Corgi", "cardigan")
    assert at["n03710637"] != at["n03710721"]
    assert at["n04355933"] != at["n04356056"]
    for name, first, last in (("imagenet-r", "goldfish", "bagel"), ("imagenet-a", "stingray", "acorn")):
        facts = CATALOG[name]
        assert len(facts["classes"]) == 200
        assert facts["folders"] == sorted(facts["folders"])
        assert facts["classes"] == [at[wnid] for wnid in facts["folders"]]
        assert first in facts["classes"][:3]
        assert last in facts["classes"]


@pytest.mark.parametrize("name", [name for name in names() if CATALOG[name]["hub"]])
def test_a_copy_in_the_hubs_layout_lands_on_the_right_texts(name, own_data):
    made = hub_copy(name, own_data)
    test = "test" if "test" in made else next((s for s in made if s.startswith("valid")), None)
    parts = {"train": "train"} if "train" in made else {}
    parts = parts | {"test": test} if test else {"all": "train"}
    task = load_task(name)
    check_labels(task, name, parts)
    assert task.template == CATALOG[name]["template"]
    assert task.split == (
        "80/20 by content" if "all" in parts else "as given" if test == "test" else f"as given, {test} as test"
    )
    if len(task.classes) > 3:
        assert load_task(name, subset="base").classes == task.classes[: (len(task.classes) + 1) // 2]


@pytest.mark.parametrize("name", [name for name in names() if CATALOG[name]["by_index"]])
def test_hub_labels_of_other_names_count_as_places_where_the_catalog_says_so(name, monkeypatch, own_data):
    count = len(CATALOG[name]["classes"])
    kind = datasets.ClassLabel(names=[f"c{i}" for i in range(count)])
    cells = {"image": [{"bytes": content("test", i), "path": None} for i in range(count)], "label": list(range(count))}
    made = datasets.Dataset.from_dict(cells, features=datasets.Features({"image": datasets.Image(), "label": kind}))
    with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.setattr(datasets, "load_dataset", lambda *_, **__: {"test": made})
        task = load_task(name)
    has = {"train": 0, "test": count}
    said = [
        f"{name}: hf:{CATALOG[name]['hub']} has {has[part]} {part} images, not {expected}"
        for part, expected in CATALOG[name]["counts"].items()
    ]
    assert [str(each.message) for each in caught if each.category is UserWarning] == said
    check_labels(task, name, {"test": "test"})
    assert task.split == ("as given" if said else CATALOG[name]["split"])  # "official" is said of the official counts
    (own_data / name).mkdir(parents=True)
    made.to_parquet(own_data / name / "test.parquet")
    with pytest.warns(UserWarning, match="its own names are used"):  # an own copy may be in any order
        assert load_task(name).classes[0] == "c0"


def folders(name):
    """How a set's folders are called where it is usually had as folders, or nowhere else."""
    facts = CATALOG[name]
    if facts["folders"] or facts["hub"] or facts["coop"] or facts["embedded"]:
        return facts["folders"]
    return [str(i) for i in range(len(facts["classes"]))] if facts["numbered"] else facts["classes"]


@pytest.mark.parametrize("name", [name for name in names() if folders(name)])
def test_a_folder_a_class(name, own_data):
    for part in ("train", "test"):
        for i, folder in enumerate(folders(name)):
            place = own_data / name / part / folder
            place.mkdir(parents=True)
            (place / "1.png").write_bytes(content(part, i))
    check_labels(load_task(name), name, {"train": "train", "test": "test"})


def test_the_expected_counts_go_without_a_word(monkeypatch):
    made = hub_copy("cifar10")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made)
    monkeypatch.setattr(named, "entry", lambda name: CATALOG[name] | {"counts": {"train": 10, "test": 10}})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        task = load_task("cifar10")
    check_labels(task, "cifar10", {"train": "train", "test": "test"})
    assert task.split == "official"


def test_names_are_looked_up_one_table_at_a_time():
    facts = {"classes": ["crane bird", "crane"], "hub_classes": ["crane", "crane2"], "folders": None, "numbered": False,
             "by_index": True}  # fmt: skip
    assert places(["crane2", "crane"], facts, hub=True) == [1, 0]
    assert places(["crane", "crane-bird", "other"], facts, hub=True) == [1, 0, None]
    assert places(["one", "two"], facts, hub=True) == [0, 1]
    assert places(["one", "two"], facts, hub=False) is None
    assert places(["one", "two", "three"], facts, hub=True) is None
    assert places(["1", "0"], facts, hub=False) is None
    assert places(["1", "0"], facts | {"numbered": True}, hub=False) == [1, 0]
    assert places(["crane2", "other"], facts, hub=True) is None  # a name that is known, elsewhere
    assert places(["other", "crane2"], facts, hub=True) == [0, 1]


@pytest.mark.parametrize("name", [name for name in names() if CATALOG[name]["numbered"] or name in ("mnist", "svhn")])
def test_numbers_are_places_only_when_they_are_as_many_as_the_classes(name):
    facts, count = CATALOG[name], len(CATALOG[name]["classes"])
    backwards = [str(i) for i in range(count)][::-1]
    assert places(backwards, facts, hub=False) == list(range(count))[::-1]
    for found in (backwards[1:], [*backwards, str(count)], [*backwards, "background"], [*map(str, range(3 * count))]):
        assert places(found, facts, hub=True) is None
    if name != "mnist":  # its names are numbers
        assert places([*facts["classes"], "background"], facts, hub=False) == [*range(count), None]


@pytest.mark.parametrize(
    ("name", "labels", "advice"),
    [
        ("cifar10", range(10), "10 numbers from 0, .* by class name, or give classes="),
        ("svhn", range(1, 11), "10 numbers from 1, .* by class name, or give classes="),
        ("mnist", range(1, 11), "10 numbers from 1, .* by class name, or give classes="),
        ("flowers102", range(1, 103), "102 numbers from 1, .* by class name or by 0 to 101, or"),
        ("pcam", range(3), "3 numbers from 0, .* by class name or by 0 to 1, or"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*its own names are used")
def test_numbers_that_are_not_places_need_names(name, labels, advice, own_data):
    cells = {"image": [{"bytes": content("test", i), "path": None} for i in labels], "label": list(labels)}
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    (own_data / name).mkdir(parents=True)
    datasets.Dataset.from_dict(cells, features=kinds).to_parquet(own_data / name / "test.parquet")
    with pytest.raises(UserError, match=f"^{name}: its labels are {advice}") as error:
        load_task(name)
    assert "\n" not in str(error.value)
    words = [f"word {i}" for i in labels]
    task = load_task(name, classes=words)
    assert task.classes == tuple(words)
    tuned = {"spec": name, "source_classes": list(task.source), "classes": words, "template": "a {}"}
    assert load_task(name, tuned=tuned).texts() == [f"a {word}" for word in words]  # a run knows its words


def test_mnists_classes_are_numbers(own_data):
    hub_copy("mnist", own_data)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert load_task("mnist").classes == tuple("0123456789")


@pytest.mark.parametrize("name", names())
def test_offline_without_data_one_line_says_how_to_get_it(name, monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\nmany lines")

    if CATALOG[name]["embedded"]:
        return
    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match=rf"^{name}.*ADVTUNE_DATA.*{name}/train.parquet") as error:
        load_task(name)
    text = str(error.value)
    assert "\n" not in text
    assert (CATALOG[name]["hub"] or "not on the hub") in text
    assert (CATALOG[name]["coop"] or {"split": ""})["split"] in text


# CoOp's split files


def write_coop(top, name, change=lambda found: None):
    """A tiny copy in CoOp's layout: two images a class and part; classes in another order than the catalog's."""
    coop = CATALOG[name]["coop"]
    classes = [text.replace(" ", "_") for text in CATALOG[name]["classes"][::-1]]
    root = top / coop["folder"]
    found = {part: [] for part in ("train", "val", "test")}
    for part, records in found.items():
        for label, text in enumerate(classes):
            for i in range(2):
                path = f"{text.replace('/', '-')}/{part}{i}.jpg"
                file = root / coop["images"] / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(f"{part} {label} {i}".encode())
                records.append([path, label, text])
    change(found)
    (root / coop["split"]).write_text(json.dumps(found))
    return root, classes


@pytest.mark.filterwarnings("ignore:.*images, not")
@pytest.mark.parametrize("name", COOP)
def test_coops_split_is_used_where_it_is(name, own_data):
    root, classes = write_coop(own_data, name)
    coop, count = CATALOG[name]["coop"], len(CATALOG[name]["classes"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        task = load_task(name)
    assert [str(each.message) for each in caught] == [
        f"{name}: {root / coop['split']} has {2 * count} {part} images, not {expected}"
        for part, expected in coop["counts"].items()
    ]
    assert task.classes == tuple(" ".join(text.replace("_", " ").split()) for text in classes)
    assert task.split == f"CoOp {CATALOG[name]['coop']['split']}"
    assert task.template == CATALOG[name]["template"]
    for part, records in task.parts.items():
        read = [records.read(i).decode().split() for i in range(len(records))]
        assert [(p, int(label)) for p, label, _ in read] == [(part, label) for label in records.labels]
    assert {part: len(select(task, Split(part))) for part in ("train", "val", "test", "fit", "all")} == {
        "train": 2 * count, "val": 2 * count, "test": 2 * count, "fit": 2 * count, "all": 6 * count,
    }  # fmt: skip
    assert named_part(task, "val").read(0).startswith(b"val")
    assert load_task(name, subset="new").classes == task.classes[(count + 1) // 2 :]


@pytest.mark.filterwarnings("ignore:.*images, not")
def test_coops_files_may_lie_under_the_catalogs_name_and_its_pickles_are_left_alone(own_data, monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    root, classes = write_coop(own_data, "dtd")
    (root / "split_fewshot").mkdir()
    (root / "split_fewshot" / "shot_1-seed_1.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert root.name == "dtd"
    root.rename(own_data / "elsewhere")
    with pytest.raises(UserError, match="be online"):
        load_task("dtd")
    (own_data / "elsewhere").rename(own_data / "dtd")
    assert len(load_task("dtd").classes) == len(classes)
    root, _ = write_coop(own_data, "food101")
    root.rename(own_data / "food101")
    assert load_task("food101").split == "CoOp split_zhou_Food101.json"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda f: f["test"][0].__setitem__(0, "../../secret.jpg"), "leaves the folder"),
        (lambda f: f["val"][0].__setitem__(0, "/etc/secret.jpg"), "leaves the folder"),
        (lambda f: f["val"][0].__setitem__(0, "C:\\secret.jpg"), "leaves the folder"),
        (lambda f: f["test"].append(f["train"][0]), "is in the train part, too"),
        (lambda f: f["test"].append(["./" + f["train"][0][0], *f["train"][0][1:]]), "is in the train part, too"),
        (lambda f: f["test"][0].__setitem__(0, "./C:/secret.jpg"), "leaves the folder"),
        (lambda f: f["test"][0].__setitem__(0, "."), "leaves the folder"),
        (lambda f: f["test"].append([f["test"][0][0], *f["test"][-1][1:]]), "is in the test part, too, label 0"),
        (lambda f: [part.__delitem__(slice(6, None)) for part in f.values()], "has 3 classes, not 47; fetch it again"),
        (lambda f: f["test"][0].__setitem__(2, "other"), "is both"),
        (lambda f: f["test"][0].__setitem__(1, "0"), "not \\[path, label, class name\\]"),
        (lambda f: f["test"][0].__setitem__(1, True), "not \\[path, label, class name\\]"),
        (lambda f: f["test"].append(["a.jpg", 99, "nine"]), "without gaps"),
        (lambda f: f.pop("val"), "has no lists"),
    ],
    ids=range(14),
)
def test_a_split_file_that_is_not_right_is_one_line(change, match, own_data):
    write_coop(own_data, "dtd", change)
    with pytest.raises(UserError, match=f"^dtd.*{match}") as error:
        load_task("dtd")
    assert "\n" not in str(error.value)


def test_a_split_file_without_its_images_or_damaged(own_data):
    root, _ = write_coop(own_data, "dtd")
    file = root / "split_zhou_DescribableTextures.json"
    file.rename(root / "other.json")
    with pytest.raises(UserError, match="put that file beside them"):
        load_task("dtd")
    (root / "other.json").rename(file)
    (root / "images").rename(root / "pictures")
    with pytest.raises(UserError, match="put them in"):
        load_task("dtd")
    (root / "pictures").rename(root / "images")
    for text in ("{", "[" * 100_000, "[]"):
        file.write_text(text)
        with pytest.raises(UserError, match=r"not JSON|has no lists"):
            open_coop(root, CATALOG["dtd"]["coop"], "dtd")
