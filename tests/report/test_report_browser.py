"""The report in a real headless Chromium: it draws, hovers, sorts, saves, obeys keys, fits, and asks for nothing."""

from __future__ import annotations

import re

import numpy as np
import pytest

from learnit_r8 import R8Scheduler
from learnit_r8.report.page import write_report
from learnit_r8.report.run_data import load_run
from tests.browser_driver import CHROMIUM, DRIVER, Browser

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium: apt-get install chromium chromium-driver, then run this again"
)
TAB, ENTER = "\ue004", "\ue007"


def train(folder, seed):
    """A run with a rollback, checkpoints, two classes of samples and hard ones among them."""
    rng = np.random.default_rng(seed)
    weights = {"w": np.zeros(2)}
    with R8Scheduler(
        200, 20, num_epochs=5, ui="off", log_dir=folder, checkpoint_dir=folder / "checkpoints", seed=seed,
        checkpoint_every="epoch", groups=np.arange(200) % 2, state_callback=lambda: weights,
        load_callback=weights.update, save_callback=lambda path: path and open(path, "w").close(),
    ) as scheduler:  # fmt: skip
        for epoch in scheduler.epoch_iterator():
            for batch in scheduler.batch_iterator():
                losses = rng.exponential(1 / (1 + epoch), len(batch.indices)) + np.where(batch.indices < 10, 4.0, 0.01)
                if scheduler.global_step == 30:
                    weights["w"], losses = weights["w"] * np.nan, losses * np.nan
                scheduler.update_with_loss(losses)
            scheduler.log(val_loss=1 / (1 + epoch), accuracy=0.5 + epoch / 10)
    (folder / "console.log").write_text("a line that the run printed\n")
    return load_run(folder)


@pytest.fixture(scope="module")
def browser():
    found = Browser()
    yield found
    found.close()


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report([train(folder / "first", 0)], folder / "one.html")
    return folder / "one.html"


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports")
    write_report([train(folder / "first", 0), train(folder / "second", 1)], folder / "two.html")
    return folder / "two.html"


DRAWN = """
const counts = [];
for (const root of document.querySelectorAll('.chart')) {
  const found = [];
  const walk = node => {
    if (node.tagName === 'CANVAS') found.push(node);
    for (const child of [...(node.shadowRoot?.children ?? []), ...node.children]) walk(child);
  };
  walk(root);
  const colours = new Set();
  for (const canvas of found) {
    if (!canvas.width || !canvas.height) continue;
    const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
    for (let i = 0; i < data.length; i += 4) if (data[i + 3]) colours.add((data[i] << 16) | (data[i + 1] << 8) | data[i + 2]);
  }
  counts.push(colours.size);
}
return counts;
"""  # noqa: E501 - JavaScript


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1600])
@pytest.mark.parametrize("name", ["one", "two"])
def test_charts_are_drawn_without_an_error_or_a_request_and_nothing_overflows(name, width, dark, browser, request):
    browser.show(request.getfixturevalue(name), width, 900, dark)
    wrong = [entry for entry in browser.log("browser") if entry["level"] in {"WARNING", "SEVERE"}]
    assert wrong == []
    addresses = browser.requests()
    assert [address for address in addresses if not address.startswith(("data:", "blob:"))][1:] == []
    counts = browser.run(DRAWN)
    assert len(counts) >= 8
    assert min(counts) > 10
    assert browser.run("return document.documentElement.scrollWidth") <= width


CONTRAST = """
const luminance = text => {
  const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const background = node => {
  for (; node; node = node.parentElement) {
    const colour = getComputedStyle(node).backgroundColor;
    if (!/, 0\\)$/.test(colour)) return colour;
  }
};
return [...document.querySelectorAll('h1, h2, h3, p, td, th button, a:not(.skip), .csv, pre')].map(node => {
  const [a, b] = [luminance(getComputedStyle(node).color), luminance(background(node))];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
});
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_has_the_contrast_that_wcag_asks_for(dark, browser, one):
    browser.show(one, 1600, 900, dark)
    assert min(browser.run(CONTRAST)) >= 4.5


def test_charts_take_the_colours_of_the_theme_also_when_it_changes(browser, one):
    colour = "return Bokeh.documents[0].roots()[0].left[0].axis_label_text_color"
    browser.show(one, dark=False)
    assert browser.run(colour) == "#1b1f24"
    browser.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    browser.until(f"{colour} === '#e4e7ec'")


def column(browser, table, place):
    script = (
        "return [...document.querySelectorAll(`#${arguments[0]} tbody tr`)].map(r => r.cells[arguments[1]].innerText)"
    )
    return browser.run(script, table, place)


def test_a_heading_sorts_its_column_up_and_down_by_mouse_and_by_keyboard(browser, one):
    browser.show(one)
    before = column(browser, "suspects0", 1)
    assert {int(sample) for sample in before[:10]} == set(range(10))
    browser.run("document.querySelectorAll('#suspects0 th button')[1].click()")
    assert column(browser, "suspects0", 1) == sorted(before, key=int)
    browser.run("document.querySelectorAll('#suspects0 th button')[1].focus()")
    browser.press(ENTER)
    assert column(browser, "suspects0", 1) == sorted(before, key=int, reverse=True)
    states = browser.run(
        "return [...document.querySelectorAll('#suspects0 th')].map(th => th.getAttribute('aria-sort'))"
    )
    assert states == ["none", "descending", *["none"] * (len(states) - 2)]


def test_numbers_sort_by_their_value_and_words_after_them(browser, one):
    browser.show(one)
    browser.run("document.querySelectorAll('#suspects0 th button')[3].click()")
    values = [float(text) for text in column(browser, "suspects0", 3)]
    assert values == sorted(values)


def test_the_table_is_saved_as_csv_with_all_digits(browser, one):
    browser.show(one)
    text = browser.run(
        """
        return new Promise(done => {
          URL.createObjectURL = blob => { blob.text().then(done); return '#'; };
          document.querySelector('[data-table=suspects0]').click();
        })
        """
    )
    heading, *rows = text.splitlines()
    assert heading.removesuffix(",flagged") == "rank,sample,class,mean loss,loss now,variability,below ln 2,trained on"
    assert len(rows) == 200
    assert re.fullmatch(r"1,\d,[01],\d\.\d{6,},\d\.\d{6,},.*", rows[0])


def test_every_chart_and_table_is_reached_by_tab_and_arrows_move_all_step_axes(browser, one):
    browser.show(one)
    reached = set()
    for _ in range(120):
        browser.press(TAB)
        found = browser.run(
            "const a = document.activeElement; return a.dataset.chart ?? a.closest?.('table')?.id ?? a.tagName"
        )
        reached.add(found)
    charts = set(browser.run("return [...document.querySelectorAll('.chart')].map(c => c.dataset.chart)"))
    assert charts | {"suspects0", "spikes0"} <= reached
    ranges = "return Bokeh.documents[0].roots().slice(0, 3).map(f => [f.x_range.start, f.x_range.end])"
    before = browser.run(ranges)
    browser.run("document.querySelector('.chart').focus()")
    browser.press("+")
    after = browser.run(ranges)
    assert after[0] == after[1] == after[2]
    assert after[0][1] - after[0][0] == pytest.approx((before[0][1] - before[0][0]) / 2)
    browser.press("0")
    assert browser.run(ranges) == before


def test_hovering_a_point_of_the_data_map_shows_its_id_and_class(browser, one):
    browser.show(one)
    place = browser.run(
        """
        const fig = Bokeh.documents[0].roots().find(f => f.x_scale && f.below[0].axis_label?.startsWith('variability'));
        const view = Object.values(Bokeh.index.roots ?? Bokeh.index).find(v => v.model === fig);
        view.el.scrollIntoView({block: 'center'});
        const data = fig.renderers[0].data_source.data, at = Array.from(data.id).indexOf(3);
        const box = view.canvas_view.el.getBoundingClientRect();
        const [[x], [y]] = [
          view.frame.x_scale.v_compute([data.x[at]]), view.frame.y_scale.v_compute([data.y[at]])];
        return [box.left + x, box.top + y];
        """
    )
    browser.move(*place)
    read = """
        const texts = [];
        const walk = node => {
          if (node.classList?.contains('bk-Tooltip')) texts.push(node.shadowRoot.textContent);
          for (const child of [...(node.shadowRoot?.children ?? []), ...node.children]) walk(child);
        };
        walk(document.body);
        return texts.join(' ');
    """
    browser.until(f"const text = (() => {{{read}}})(); return /sample/.test(text)")
    text = browser.run(read)
    assert re.search(r"sample:?\s*3\b", text), text
    assert re.search(r"class:?\s*1\b", text), text


def test_two_runs_have_their_own_columns_and_a_legend(browser, two):
    browser.show(two, 1600)
    tops = browser.run("return [...document.querySelectorAll('#samples + .side > .run')].map(r => r.offsetTop)")
    assert len(tops) == 2
    assert tops[0] == tops[1]
    names = browser.run(
        "return Bokeh.documents[0].roots()[0].center.find(c => c.type === 'Legend').items.map(i => i.label.value)"
    )
    assert names == ["first", "second"]
    browser.show(two, 400)
    tops = browser.run("return [...document.querySelectorAll('#samples + .side > .run')].map(r => r.offsetTop)")
    assert tops[0] < tops[1]
