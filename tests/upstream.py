"""diffusers' own tests of the supported models and pipelines, with rectified attention enabled on all of them.

    python tests/upstream.py FOLDER [pytest arguments]

FOLDER is a checkout of diffusers. Each file of tests runs twice, untouched and enabled with all blocks kept. A test
that passes untouched has to pass enabled, or to end in one of the refusals below. Prints a line a file; exits with 1
where a test fails for another reason.
"""

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
MODELS = """
    allegro anyflow bria bria_fibo chronoedit cogvideox consisid cosmos cosmos3 easyanimate ernie_image flux
    flux2 hunyuan_1_5 hunyuan_video hunyuan_video_framepack ideogram4 joyimage joyimage_edit_plus krea2
    longcat_image ltx ltx2 minimax_h3 mochi motif_video ovis_image qwenimage sd3 skyreels_v2 wan wan_animate
    wan_vace z_image
"""
PIPELINES = """
    allegro anyflow bria bria_fibo bria_fibo_edit chronoedit cogvideo consisid cosmos easyanimate flux flux2
    hunyuan_image_21 hunyuan_video hunyuan_video1_5 ideogram4 joyimage kandinsky5 krea2 longcat_image ltx
    ltx2 mochi motif_video ovis_image qwenimage skyreels_v2 stable_diffusion_3 wan z_image
"""
FILES = (
    *(f"models/transformers/test_models_transformer_{name}.py" for name in MODELS.split()),
    *(f"pipelines/{name}" for name in PIPELINES.split()),
)
# What an enabled model refuses, by what its error says.
REFUSALS = {
    "training": ("is for inference", "has no gradient"),
    "pickling": ("cannot be pickled or saved whole",),
    "context parallelism": ("Context parallelism with rectified attention",),
    "tokens of no one layout": (
        "reference images with a cache",
        "the same images in every sample",
        "allowed: one size",
    ),
    "failing as marked": ("xfail",),
    "masks of other kinds": ("attention mask: got",),
}


def outcomes(folder: Path, name: str, plugin: bool, arguments: list[str]) -> dict[str, str | None]:
    """Test -> None where it passed, else what it said. Skipped tests are left out."""
    with tempfile.NamedTemporaryFile(suffix=".xml") as report:
        command = [sys.executable, "-m", "pytest", f"tests/{name}", "-q", "-p", "no:cacheprovider"]
        command += [*(("-p", "upstream_plugin") if plugin else ()), f"--junitxml={report.name}", *arguments]
        subprocess.run(command, cwd=folder, env=environment(), stdout=subprocess.DEVNULL, check=False)
        cases = xml.parse(report.name).getroot().iter("testcase")
        return {
            f"{case.get('classname')}::{case.get('name')}": message(case)
            for case in cases
            if (skipped := case.find("skipped")) is None or skipped.get("type") == "pytest.xfail"
        }


def message(case: xml.Element) -> str | None:
    failure = next((part for part in case if part.tag in ("failure", "error", "skipped")), None)
    return None if failure is None else f"{failure.get('message')}\n{failure.text}"


def environment() -> dict[str, str]:
    import os

    paths = [str(HERE), str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def refusal(text: str) -> str | None:
    return next((kind for kind, words in REFUSALS.items() if any(word in text for word in words)), None)


def main() -> None:
    if len(sys.argv) < 2 or not (Path(sys.argv[1]) / "tests" / "models").is_dir():
        sys.exit("upstream: name a checkout of diffusers, with tests/models in it: make upstream-test DIFFUSERS=FOLDER")
    folder, arguments = Path(sys.argv[1]), sys.argv[2:]
    total, refused, broken = 0, Counter[str](), list[str]()
    for name in FILES:
        if not (folder / "tests" / name).exists():
            print(f"{name}: not in this checkout", flush=True)
            continue
        before = {test for test, said in outcomes(folder, name, False, arguments).items() if said is None}
        after = outcomes(folder, name, True, arguments)
        failures = {test: after.get(test, "was not run") for test in sorted(before) if after.get(test, "") is not None}
        kinds = {test: refusal(said or "") for test, said in failures.items()}
        total += len(before)
        refused.update(kind for kind in kinds.values() if kind)
        broken += [test for test, kind in kinds.items() if kind is None]
        print(f"{name}: {len(before)} pass untouched, {len(before) - len(failures)} enabled", flush=True)
        for test, kind in kinds.items():
            said = (failures[test] or "").strip().splitlines() or [""]
            print(f"    {test}: {kind or 'BROKEN'}: {said[0][:160]}", flush=True)
    print(f"{total} tests pass untouched; refused: {dict(refused)}; broken: {len(broken)}")
    sys.exit(1 if broken or not total else 0)


if __name__ == "__main__":
    main()
