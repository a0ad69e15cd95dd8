"use strict";
// Gives the charts the page's colours, makes tables sort and charts answer to keys. No network, no eval.
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");

  const paint = () => {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const [text, dim, line, grid, panel] = ["--text", "--dim", "--line", "--grid", "--panel"].map(colour);
    for (const fig of figures()) {
      fig.setv({ outline_line_color: line });
      for (const part of [...fig.below, ...fig.left]) {
        part.setv({
          axis_label_text_color: text, major_label_text_color: dim, axis_line_color: line,
          major_tick_line_color: line, minor_tick_line_color: null,
        });
      }
      for (const part of fig.center) {
        if (part.type === "Grid") part.setv({ grid_line_color: grid });
        if (part.type === "Legend") {
          part.setv({
            label_text_color: text, background_fill_color: panel, background_fill_alpha: 0.8,
            border_line_color: line, inactive_fill_color: colour("--page"),
          });
        }
      }
    }
  };

  const figures = () => Bokeh.documents.flatMap((doc) => doc.roots()).filter((root) => root.type === "Figure");

  const byName = (name) => figures().find((fig) => fig.name === name);

  // Keys of a chart in focus: arrows move, + and - zoom about the middle, 0 shows all.
  const keys = (event) => {
    const chart = event.currentTarget, fig = byName(chart.dataset.chart);
    if (!fig || event.ctrlKey || event.metaKey || event.altKey) return;
    const range = fig.x_range, { start, end } = range, width = end - start, middle = (start + end) / 2;
    chart.whole ??= [start, end];
    const log = fig.x_scale.type === "LogScale";
    const moves = {
      ArrowLeft: [start - width / 8, end - width / 8], ArrowRight: [start + width / 8, end + width / 8],
      "+": [middle - width / 4, middle + width / 4], "=": [middle - width / 4, middle + width / 4],
      "-": [middle - width, middle + width], 0: chart.whole,
    };
    const move = moves[event.key];
    if (!move || log || event.target !== chart) return;
    event.preventDefault();
    range.setv({ start: move[0], end: move[1] });
  };

  const sort = (button) => {
    const head = button.closest("th"), table = head.closest("table"), place = head.cellIndex;
    const down = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of table.tHead.rows[0].cells) {
      if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
    }
    head.setAttribute("aria-sort", down === 1 ? "ascending" : "descending");
    const value = (row) => {
      const cell = row.cells[place], text = cell.dataset.value ?? cell.textContent, number = Number(text);
      return text === "" ? -Infinity : Number.isNaN(number) ? text : number;
    };
    const compare = (a, b) => (typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1);
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => [value(row), row]);
    rows.sort((a, b) => down * compare(a[0], b[0]));
    body.append(...rows.map(([, row]) => row));
  };

  const quoted = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);

  const save = (button) => {
    const rows = [...document.getElementById(button.dataset.table).rows];
    const lines = rows.map((row) => [...row.cells].map((cell) => quoted(cell.dataset.value ?? cell.textContent)).join(","));
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([lines.join("\n") + "\n"], { type: "text/csv" }));
    link.download = button.dataset.file;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };

  // A page that a server keeps up to date asks for news all the time, and is loaded anew where there are other charts.
  const columns = (data) => Object.fromEntries(Object.entries(data).map(
    ([name, values]) => [name, values.map((value) => (value === null ? NaN : value))]));

  const take = (news) => {
    const titles = [...document.querySelectorAll(".chart")].map((chart) => chart.dataset.title);
    const sources = new Map();
    for (const fig of figures()) for (const part of fig.renderers) {
      if (part.data_source?.name) sources.set(part.data_source.name, part.data_source);
    }
    const names = Object.keys(news.sources);
    const same = names.length === sources.size && names.every((name) => sources.has(name));
    if (!same || JSON.stringify(titles) !== JSON.stringify(news.titles)) return location.reload();
    for (const name of names) sources.get(name).data = columns(news.sources[name]);
    const shared = figures().find((fig) => fig.name === "chart0").x_range, shown = [shared.start, shared.end];
    // Who has moved the axis keeps the part that is looked at.
    if (String(shown) === String(take.steps ?? shown)) shared.setv({ start: news.steps[0], end: news.steps[1] });
    take.steps = news.steps;
    for (const [id, html] of Object.entries(news.html)) document.getElementById(id).innerHTML = html;
    document.documentElement.dataset.version = news.version;
  };

  const ask = async (known) => {
    const said = document.getElementById("live");
    try {
      const address = new URL("news" + location.search, location.href);
      address.searchParams.set("known", known);
      const answer = await fetch(address);
      if (answer.status === 200) {
        const news = await answer.json();
        known = news.version;
        take(news);
      }
      said.textContent = answer.ok ? "Live." : `The server cannot read the run now: ${await answer.text()}`;
    } catch (error) {
      said.textContent = `The server cannot be reached; what is shown is old. (${error.message})`;
    }
    setTimeout(ask, 600, known);
  };

  addEventListener("DOMContentLoaded", () => {
    for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => sort(button));
    for (const button of document.querySelectorAll(".csv")) button.addEventListener("click", () => save(button));
    for (const chart of document.querySelectorAll(".chart")) chart.addEventListener("keydown", keys);
    for (const text of document.querySelectorAll("pre")) text.parentElement.scrollTop = text.parentElement.scrollHeight;
    const wait = setInterval(() => {
      if (figures().length < document.querySelectorAll(".chart").length) return;
      clearInterval(wait);
      paint();
      dark.addEventListener("change", paint);
      document.documentElement.dataset.ready = "yes";
      if ("live" in document.documentElement.dataset) ask("");
    }, 20);
  });
})();
