"""The page in a browser: what is typed stays text, frames change, and the end is the API's text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.serving.conftest import Running, running
from tests.serving.test_load import slow_down

expect.set_options(timeout=60_000)  # a busy machine of two cores is slow

CHROMIUM = Path("/usr/bin/chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not CHROMIUM.is_file(), reason=f"no {CHROMIUM}: apt-get install -y chromium"
    ),
]
HOSTILE = "<script>document.title=2</script><img src=x onerror=alert()>\n"


@pytest.fixture(scope="module")
def site(artifact: Path) -> Iterator[Running]:
    with running(artifact, "--slots", "8") as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as started:
        # Without a sandbox: tests may run as root, and the page is our own.
        args = ["--no-sandbox", "--disable-gpu", "--no-proxy-server"]
        made = started.chromium.launch(executable_path=str(CHROMIUM), args=args)
        yield made
        made.close()


@pytest.fixture
def allowed() -> list[str]:
    """Parts of error messages on the console that a test brings about."""
    return []


@pytest.fixture
def page(browser: Browser, site: Running, allowed: list[str]) -> Iterator[Page]:
    made = browser.new_page()
    errors = list[str]()
    made.on("pageerror", lambda error: errors.append(str(error)))
    made.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    made.goto(site.url)
    yield made
    made.close()
    assert [each for each in errors if not any(part in each for part in allowed)] == []


def fill(page: Page, **values: str) -> None:
    for name, value in values.items():
        field = page.locator(f"#{name}")
        if name in ("mode", "hole", "pace"):
            field.select_option(value)
        else:
            field.fill(value)


def test_frames_change_and_the_end_is_the_text_of_the_api(
    page: Page, site: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    body: dict[str, Any] = dict(prompt="def f(x):\n    ", suffix="\nreturn x", seed=3, steps=6)
    body |= dict(max_tokens=12, mode="refine", hole=12, temperature=0)
    fill(page, prompt=body["prompt"], suffix=body["suffix"], seed="3", steps="6", tokens="12")
    fill(page, hole="fixed", pace="120")
    slow_down(
        site.service.engine, 0.1, monkeypatch
    )  # frames that are not read in time are left out
    page.evaluate(
        """() => { window.seen = new Set();
        new MutationObserver(() => seen.add(document.querySelector("#left .text").innerHTML))
          .observe(document.querySelector("#left .text"), { childList: true }); }"""
    )
    page.click("#run")
    expect(page.locator("#left[data-done]")).to_be_attached()
    expect(page.locator("#right[data-done]")).to_be_attached()
    assert page.evaluate("seen.size") >= 4
    whole = site.post("/v1/completions", **body).json()["choices"][0]["text"]
    assert page.locator("#left .text").text_content() == body["prompt"] + whole + body["suffix"]
    causal = {**body, "mode": "ar", "suffix": None, "steps": None}
    text = site.post("/v1/completions", **causal).json()["choices"][0]["text"]
    assert page.locator("#right .text").text_content() == body["prompt"] + text + body["suffix"]
    for side in ("#left", "#right"):
        expect(page.locator(f"{side} .status")).to_contain_text("tokens/s")
    page.locator("#left .frames").fill("0")  # back to the first pass
    expect(page.locator("#left .open").first).to_be_visible()


def test_what_is_typed_is_inert(page: Page, allowed: list[str]) -> None:
    fill(page, prompt=HOSTILE, suffix="<b>after</b>", tokens="4", pace="0")
    page.click("#run")
    expect(page.locator("#left[data-done]")).to_be_attached()
    assert page.title() == "Text diffusion"
    shown = page.locator("#left .text").text_content() or ""
    assert shown.startswith(HOSTILE)
    assert shown.endswith("<b>after</b>")
    assert len(shown) > len(HOSTILE) + len("<b>after</b>")
    assert page.locator(".text img, .text script, .text b").count() == 0
    policy = page.request.get(page.url).headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    # The policy is in force: a script of an attacker would not run.
    allowed.append("Content Security Policy")
    ran = page.evaluate(
        """() => { const made = document.createElement("script");
        made.textContent = "window.ran = 1"; document.body.append(made); return window.ran; }"""
    )
    assert ran is None


def test_cancel_frees_the_slots(page: Page, site: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = site.service.engine
    slow_down(engine, 0.5, monkeypatch)  # 80 tokens take 40 s
    fill(page, suffix="", mode="ar", tokens="80")
    page.click("#run")
    for side in ("#left", "#right"):
        expect(page.locator(f"{side} .status")).to_contain_text("Pass")
    assert len(engine.active()) == 2
    page.click("#cancel")
    expect(page.locator("#left .status")).to_have_text("Cancelled.")
    assert site.wait_idle(15)
    expect(page.locator("#run")).to_be_enabled()


def test_errors_are_shown(page: Page, allowed: list[str]) -> None:
    allowed.append("status of 429")
    page.route(
        "**/v1/completions",
        lambda route: route.fulfill(status=429, json={"error": {"message": "all slots are busy"}}),
    )
    page.click("#run")
    expect(page.locator("#left .status.error")).to_have_text("all slots are busy")


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_overflows_in_either_theme(
    browser: Browser, site: Running, width: int, theme: Any
) -> None:
    view: Any = {"width": width, "height": 900}
    made = browser.new_page(viewport=view, color_scheme=theme)
    made.goto(site.url)
    made.fill("#prompt", "x = '" + "wide" * 100 + "'\n")
    made.click("#run")
    expect(made.locator("#right[data-done]")).to_be_attached()
    assert made.evaluate("document.documentElement.scrollWidth") <= width
    columns = "getComputedStyle(document.querySelector('.panels')).gridTemplateColumns.split(' ')"
    assert len(made.evaluate(columns)) == (1 if width == 400 else 2)
    colour = "getComputedStyle(document.body).backgroundColor"
    assert made.evaluate(colour) == (
        "rgb(246, 246, 243)" if theme == "light" else "rgb(20, 21, 23)"
    )
    made.close()
