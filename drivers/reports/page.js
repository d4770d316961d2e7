// Draw the runs that page.py has put into the page as JSON. Logged texts are set as text, never as HTML.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const DASHES = ["", "6 4", "2 3", "8 3 2 3"];
  const HEIGHT = 230;
  const MARGIN = { left: 50, right: 18, top: 10, bottom: 34 };
  const MAX_MARKED_POINTS = 40;
  const ROWS_PER_PAGE = 10;
  const TIME_UNITS = { seconds: 1, minutes: 60, hours: 3600 };
  const single = data.series.length === 1;
  const hidden = new Set(); // numbers of hidden series
  let byTime = false;

  for (const line of data.panels.flatMap((panel) => panel.lines)) {
    const named = ([step, seconds, value, low, high, runs]) => ({ step, seconds, value, low, high, runs });
    line.points = line.points.map(named);
  }

  // --- elements ---

  function fill(element, { color, ...attributes }, children) {
    if (color === "text") element.style.setProperty("--own-color", "var(--text)");
    else if (color !== undefined) element.style.setProperty("--own-color", `var(--c${color % data.colors})`);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }
  const html = (name, attributes, ...children) => fill(document.createElement(name), attributes, children);
  const svg = (name, attributes, ...children) =>
    fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);

  function tableOf(caption, head, rows) {
    const cells = (kind, row, more) => html("tr", {}, ...row.map((value) => html(kind, more, value)));
    const top = html("thead", {}, cells("th", head, { scope: "col" }));
    const body = html("tbody", {}, ...rows.map((row) => cells("td", row, {})));
    return html("table", {}, html("caption", {}, caption), top, body);
  }

  // --- words ---

  function readable(value) {
    if (value === null) return "";
    const size = Math.abs(value);
    if (size >= 10000) return Math.round(value).toLocaleString("en");
    return size !== 0 && size < 0.001 ? value.toExponential(1) : String(Number(value.toPrecision(4)));
  }

  function clock(seconds) {
    const whole = Math.round(seconds);
    const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
    const two = (n) => String(n).padStart(2, "0");
    return hours ? `${hours}:${two(minutes)}:${two(rest)}` : `${minutes}:${two(rest)}`;
  }

  function nameOf(panel, line) {
    const [series, quantity] = [data.series[line.series].name, panel.quantities[line.quantity]];
    if (single) return quantity;
    return panel.quantities.length > 1 ? `${series}, ${quantity}` : series;
  }

  const stepsOf = ({ first, last }) => (first === last ? `step ${first}` : `steps ${first} to ${last}`);

  // --- a plot and its axes ---

  const position = ({ step, seconds }) => (byTime ? seconds : step);
  const shownLines = (panel) => panel.lines.filter((line) => !hidden.has(line.series));

  function farthest() {
    // All panels share one horizontal axis, so that they can be compared.
    const points = data.panels.flatMap(shownLines).flatMap((line) => line.points);
    return points.reduce((max, point) => Math.max(max, position(point)), byTime ? 1e-9 : 1);
  }

  function ticks(low, high, count, minStep) {
    const rough = (high - low) / count || 1;
    const power = 10 ** Math.floor(Math.log10(rough));
    const size = Math.max(minStep, power * [1, 2, 5, 10].find((n) => n * power >= rough));
    const values = [];
    for (let k = Math.ceil(low / size - 1e-9); k * size <= high + size * 1e-9; k++) values.push(k * size);
    return values;
  }

  function ticksBelow(longest, width) {
    // Return the label of the horizontal axis and its ticks: a position and a text each.
    const fits = ([, size]) => longest < 180 * size || size === 3600;
    const [name, unit] = byTime ? Object.entries(TIME_UNITS).find(fits) : ["step", 1];
    const count = Math.max(3, Math.floor(width / 70));
    return [name, ticks(0, longest / unit, count, byTime ? 0 : 1).map((value) => [value * unit, readable(value)])];
  }

  function frame(box, [left, right], [low, high], [name, below]) {
    const width = Math.max(260, box.clientWidth);
    const inner = { left: MARGIN.left, right: width - MARGIN.right, top: MARGIN.top, bottom: HEIGHT - MARGIN.bottom };
    const x = (value) => inner.left + ((value - left) / (right - left)) * (inner.right - inner.left);
    const y = (value) => inner.bottom - ((value - low) / (high - low)) * (inner.bottom - inner.top);
    const picture = svg("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", tabindex: 0 });
    for (const value of ticks(low, high, 5, 0)) {
      picture.append(
        svg("line", { class: "grid", x1: inner.left, x2: inner.right, y1: y(value), y2: y(value) }),
        svg("text", { x: inner.left - 6, y: y(value) + 4, "text-anchor": "end" }, readable(value)),
      );
    }
    const write = (place, height, text) =>
      picture.append(svg("text", { x: place, y: height, "text-anchor": "middle" }, text));
    for (const [value, text] of below) write(x(value), inner.bottom + 15, text);
    write((inner.left + inner.right) / 2, HEIGHT - 4, name);
    return { picture, x, y, inner };
  }

  function follow(figure, picture, places, isUpright, describe) {
    // Show a cursor and a tooltip at the place nearest to the pointer, or step through the places with arrow keys.
    const tip = figure.querySelector(".tip");
    const cursor = svg("line", { class: "cursor", visibility: "hidden" });
    const { width } = picture.viewBox.baseVal;
    picture.append(cursor);
    let current = -1;

    function show(place) {
      current = place;
      const at = places[place];
      const [x1, y1, x2, y2] = isUpright ? [at, MARGIN.top, at, HEIGHT - MARGIN.bottom] : [0, at, width, at];
      fill(cursor, { x1, y1, x2, y2, visibility: "visible" }, []);
      const [title, ...rows] = describe(place);
      const mark = (color) => (color === null ? "▲ " : html("i", { class: "swatch", color }));
      const lines = rows.map(([color, text]) => html("span", {}, mark(color), text));
      tip.replaceChildren(html("strong", {}, title), ...lines);
      tip.hidden = false;
      tip.classList.toggle("left", isUpright && at > width / 2);
    }

    function hide() {
      current = -1;
      tip.hidden = true;
      cursor.setAttribute("visibility", "hidden");
    }

    function point(event) {
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(picture.getScreenCTM().inverse());
      const distances = places.map((place) => Math.abs(place - (isUpright ? at.x : at.y)));
      show(distances.indexOf(Math.min(...distances)));
    }

    picture.addEventListener("pointermove", point);
    picture.addEventListener("pointerdown", point);
    picture.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
    picture.addEventListener("blur", hide);
    picture.addEventListener("keydown", (event) =>
      event.key === "Escape" ? hide() : stepBy(event, current, places, show),
    );
  }

  function stepBy(event, current, items, go) {
    const last = items.length - 1;
    const to = { ArrowRight: Math.min(last, current + 1), ArrowLeft: Math.max(0, current - 1), Home: 0, End: last };
    if (!(event.key in to)) return;
    event.preventDefault();
    go(to[event.key]);
  }

  // --- charts ---

  const colorOf = (line) => (single ? line.quantity : line.series);
  const dashOf = (quantity) => DASHES[quantity % DASHES.length];
  const lineClass = (series) => (series < data.colors ? "line" : "line thin");

  function drawLines(figure, panel) {
    const lines = shownLines(panel);
    const points = lines.flatMap((line) => line.points);
    const box = figure.querySelector(".plot");
    if (!points.length) return box.replaceChildren(html("p", { class: "note" }, "Hidden."));
    const values = points.flatMap(({ value, low, high }) => [value, low ?? value, high ?? value]);
    const bounds = panel.is_share ? [0, 1] : []; // the accuracy of a custom reward may leave [0, 1]
    const [min, max] = [Math.min(...bounds, ...values), Math.max(...bounds, ...values)];
    const room = (max - min || Math.abs(min) || 1) * 0.05;
    const longest = farthest();
    const below = ticksBelow(longest, box.clientWidth);
    const plot = frame(box, [0, longest], [min - room, max + room], below);
    const marks = data.anomalies.filter((mark) => !hidden.has(mark.series));
    for (const line of lines) drawLine(plot, line);
    for (const mark of marks) drawMark(plot, mark);

    const stops = [...new Map(points.map((point) => [position(point), point])).values()];
    stops.sort((a, b) => position(a) - position(b));
    const places = stops.map((point) => plot.x(position(point)));
    follow(figure, plot.picture, places, true, (k) => {
      const distance = (point) => Math.abs(plot.x(position(point)) - places[k]);
      const nearest = lines.map((line) => [line, line.points.reduce((a, b) => (distance(b) < distance(a) ? b : a))]);
      const shown = nearest.filter(([, point]) => distance(point) <= (byTime ? 8 : 0.01));
      const texts = shown.map(([line, point]) => [
        colorOf(line),
        `${nameOf(panel, line)}: ${valueText(line, point)}`,
      ]);
      const nearMarks = marks.filter((mark) => {
        const [from, to] = spanOf(plot, mark);
        return from <= places[k] + 1 && places[k] <= to + 1;
      });
      const { step, seconds } = stops[k];
      const title = byTime ? clock(seconds) : `step ${step}`;
      return [title, ...texts, ...[...new Set(nearMarks.map((mark) => mark.text))].map((text) => [null, text])];
    });

    const ends = lines.map((line) => {
      const [first, last] = [line.points[0], line.points.at(-1)];
      const from = `${readable(first.value)} at step ${first.step}`;
      return `${nameOf(panel, line)} from ${from} to ${readable(last.value)} at step ${last.step}`;
    });
    const label = `${panel.title}, ${panel.unit}: ${ends.join("; ")}. Arrow keys step through it.`;
    plot.picture.setAttribute("aria-label", label);
    box.replaceChildren(plot.picture);
  }

  function drawLine({ picture, x, y }, line) {
    const color = colorOf(line);
    const ranged = line.points.filter((point) => point.low !== null);
    const places = (points, value) =>
      points.map((point) => `${x(position(point)).toFixed(1)} ${y(value(point)).toFixed(1)}`);
    if (data.series[line.series].runs > 1 && ranged.length) {
      const upper = places(ranged, (point) => point.high);
      const lower = places(ranged, (point) => point.low).reverse();
      picture.append(svg("path", { class: "band", d: `M${[...upper, ...lower].join("L")}Z`, color }));
    } else {
      for (const point of ranged) {
        const [left, low, high] = [x(position(point)) - 3, y(point.low), y(point.high)];
        const d = `M${left} ${low}h6m-3 0V${high}m-3 0h6`;
        picture.append(svg("path", { class: "whisker", d, color }));
      }
    }
    const d = `M${places(line.points, (point) => point.value).join("L")}`;
    const style = { class: lineClass(line.series), "stroke-dasharray": dashOf(line.quantity) };
    picture.append(svg("path", { ...style, d, color }));
    for (const point of line.points.length <= MAX_MARKED_POINTS ? line.points : []) {
      picture.append(svg("circle", { cx: x(position(point)), cy: y(point.value), r: 2.5, color }));
    }
  }

  function spanOf({ x, inner }, mark) {
    const places = [mark.first, mark.last].map((step, k) => x(position({ step, seconds: mark.seconds[k] })));
    return places.map((place) => Math.min(inner.right, Math.max(inner.left, place)));
  }

  function drawMark(plot, mark) {
    const [from, to] = spanOf(plot, mark);
    const d = `M${from - 5} ${plot.inner.bottom}h10l-5 -9zM${from} ${plot.inner.bottom}H${to}`;
    const title = svg("title", {}, `${mark.run}, ${stepsOf(mark)}: ${mark.text}`);
    plot.picture.append(svg("path", { class: "mark", d }, title));
  }

  function valueText(line, { step, value, low, high, runs }) {
    const range = low === null ? "" : ` [${readable(low)}, ${readable(high)}]`;
    const all = data.series[line.series].runs;
    const about = [byTime ? `, step ${step}` : "", all > 1 ? `, ${runs} of ${all} runs` : ""];
    return `${readable(value)}${range}${about.join("")}`;
  }

  function drawTimes(figure, times) {
    const box = figure.querySelector(".plot");
    const totals = times.labels.map((_, k) => times.phases.reduce((sum, phase) => sum + phase.seconds[k], 0));
    const [picture, places] = times.step_by_step ? drawColumns(box, times, totals) : drawBars(box, times, totals);
    follow(figure, picture, places, times.step_by_step, (k) => [
      `${times.step_by_step ? "step " : ""}${times.labels[k]}: ${readable(totals[k])} s`,
      ...times.phases
        .filter((phase) => phase.seconds[k])
        .map((phase) => [phase.color, `${phase.name}: ${readable(phase.seconds[k])} s`]),
    ]);
    const all = times.labels.slice(0, 30).map((label, k) => `${label} ${readable(totals[k])}`);
    picture.setAttribute("aria-label", `Time by phase, seconds: ${all.join(", ")}. Arrow keys step through it.`);
    box.replaceChildren(picture);
  }

  function drawColumns(box, times, totals) {
    // Draw a column for each step of a single series.
    const n = totals.length;
    const stride = Math.ceil(n / Math.max(2, Math.floor(box.clientWidth / 60)));
    const below = times.labels.map((label, k) => [k, label]).filter(([k]) => k % stride === 0);
    const { picture, x, y } = frame(box, [-0.6, n - 0.4], [0, Math.max(...totals) * 1.03], ["step", below]);
    const width = Math.max(1, (x(1) - x(0)) * 0.8);
    for (let k = 0; k < n; k++) {
      let base = 0;
      for (const { seconds, color } of times.phases) {
        const top = y(base + seconds[k]);
        picture.append(svg("rect", { x: x(k) - width / 2, y: top, width, height: y(base) - top, color }));
        base += seconds[k];
      }
    }
    return [picture, totals.map((_, k) => x(k))];
  }

  function drawBars(box, times, totals) {
    // Draw a bar for each of several series.
    const width = Math.max(260, box.clientWidth);
    const row = 40;
    const viewBox = `0 0 ${width} ${row * totals.length + 4}`;
    const picture = svg("svg", { viewBox, role: "img", tabindex: 0 });
    times.labels.forEach((label, k) => {
      picture.append(svg("text", { x: 2, y: k * row + 14 }, label));
      let left = 2;
      for (const { seconds, color } of times.phases) {
        const long = (seconds[k] / Math.max(...totals)) * (width - 4);
        picture.append(svg("rect", { x: left, y: k * row + 19, width: long, height: 16, color }));
        left += long;
      }
    });
    return [picture, totals.map((_, k) => k * row + 27)];
  }

  function key(color, dash, name, series = 0) {
    const line = svg("path", { class: lineClass(series), d: "M1 5H25", color, "stroke-dasharray": dash });
    return [svg("svg", { viewBox: "0 0 26 10", class: "sample", "aria-hidden": "true" }, line), name];
  }

  function figureOf(title, unit, keys, makeTables) {
    // Build a figure with a table of its numbers, which is filled when it is first opened.
    const numbers = html("details", {}, html("summary", {}, "Numbers"));
    const makeOnce = () => {
      const region = { class: "scroll", tabindex: 0, role: "region", "aria-label": `${title}, numbers` };
      numbers.append(html("div", region, ...makeTables()));
    };
    numbers.addEventListener("toggle", makeOnce, { once: true });
    const caption = html("figcaption", {}, html("strong", {}, title), html("span", {}, unit));
    const tip = html("div", { class: "tip", "aria-live": "polite", hidden: "" });
    const stage = html("div", { class: "stage" }, html("div", { class: "plot" }), tip);
    const legend = html("ul", { class: "keys" }, ...keys.map((parts) => html("li", {}, ...parts)));
    return html("figure", {}, caption, stage, legend, numbers);
  }

  function figureOfLines(panel) {
    const names = panel.quantities.length > 1 ? panel.quantities : [];
    const keys = names.map((name, k) => key(single ? k : "text", dashOf(k), name));
    return figureOf(panel.title, panel.unit, keys, () =>
      panel.lines.map((line) => {
        const numbers = ({ value, low, high }) => [value, low, high].map(readable);
        const rows = line.points.map((point) => [point.step, clock(point.seconds), ...numbers(point)]);
        return tableOf(nameOf(panel, line), ["step", "wall-clock", "value", "low", "high"], rows);
      }),
    );
  }

  function figureOfTimes(times) {
    const keys = times.phases.map(({ name, color }) => [html("i", { class: "swatch", color }), name]);
    return figureOf("Time by phase", times.step_by_step ? "seconds" : "seconds, mean step", keys, () => {
      const rows = times.labels.map((label, k) => [label, ...times.phases.map((phase) => readable(phase.seconds[k]))]);
      const what = times.step_by_step ? "step" : "series";
      return [tableOf("Seconds", [what, ...times.phases.map((phase) => phase.name)], rows)];
    });
  }

  function buildCharts() {
    const charts = document.getElementById("charts");
    const drawn = data.panels.map((panel) => [figureOfLines(panel), drawLines, panel]);
    if (data.times) drawn.push([figureOfTimes(data.times), drawTimes, data.times]);
    charts.append(...drawn.map(([figure]) => figure));
    const draw = () => drawn.forEach(([figure, how, what]) => how(figure, what));

    const legend = document.getElementById("legend");
    legend.hidden = single;
    (single ? [] : data.series).forEach(({ name }, number) => {
      const button = html("button", { type: "button", "aria-pressed": "true" }, ...key(number, "", name, number));
      button.addEventListener("click", () => {
        if (!hidden.delete(number)) hidden.add(number);
        button.setAttribute("aria-pressed", String(!hidden.has(number)));
        draw();
      });
      legend.append(html("li", {}, button));
    });
    for (const radio of document.querySelectorAll("input[name=axis]")) {
      radio.addEventListener("change", () => {
        byTime = radio.value === "time";
        draw();
      });
    }
    let width = 0;
    const fit = () => {
      if (charts.clientWidth === width) return;
      width = charts.clientWidth;
      draw();
    };
    new ResizeObserver(fit).observe(charts);
    fit();
  }

  // --- a response, token by token ---

  const COLORINGS = {
    log_probs: { name: "policy log-prob", samples: [0, -0.1, -0.5, -1, -2, -5] },
    sampler_log_probs: { name: "sampler log-prob", samples: [0, -0.1, -0.5, -1, -2, -5] },
    entropy: { name: "entropy", samples: [0, 0.1, 0.5, 1, 2, 3] },
    advantage: { name: "advantage", samples: [-2, -1, -0.5, 0, 0.5, 1, 2] },
  };
  let coloring = "log_probs"; // the last choice, also used for the next response

  function paint(element, kind, value) {
    // Values from the last sample on have the full color. The square root keeps small values visible.
    const full = COLORINGS[kind]?.samples.at(-1);
    const strength = kind === "" || value === null ? 0 : Math.sqrt(Math.min(1, Math.abs(value / full)));
    const hue = kind !== "advantage" ? "--heat" : value > 0 ? "--gain" : "--loss";
    const mixed = `color-mix(in srgb, var(${hue}) ${Math.round(strength * 100)}%, transparent)`;
    element.style.backgroundColor = strength ? mixed : "";
    return element;
  }

  const isInserted = (row, k) => row.sampled?.[k] === false;
  const valueAt = (row, name, k) => (isInserted(row, k) ? null : Array.isArray(row[name]) ? row[name][k] : row[name]);

  function tokensOf(row) {
    const spans = row.tokens.map((token, k) => {
      const kind = [token ? "" : "part", isInserted(row, k) ? "inserted" : ""].join(" ").trim();
      return html("span", { "data-k": k, class: kind }, token.replace(/\n/g, "↵\n") || "·");
    });
    const named = { class: "tokens", tabindex: 0, role: "group", "aria-label": "Response, token by token" };
    const text = html("div", named, ...spans);
    const underlined = row.sampled?.includes(false) ? " Underlined tokens were inserted, not sampled." : "";
    const hint = `Point at a token, or step through them with the arrow keys.${underlined}`;
    const readout = html("p", { class: "readout", "aria-live": "polite" }, hint);

    const kinds = Object.keys(COLORINGS).filter((kind) =>
      row.tokens.some((_, k) => (valueAt(row, kind, k) ?? null) !== null),
    );
    const options = kinds.map((kind) => html("option", { value: kind }, COLORINGS[kind].name));
    const choice = html("select", {}, ...options, html("option", { value: "" }, "nothing"));
    choice.value = coloring === "" || kinds.includes(coloring) ? coloring : (kinds[0] ?? "");
    const scale = html("span", { class: "scale" });
    const paintAll = () => {
      const kind = choice.value;
      spans.forEach((span, k) => paint(span, kind, valueAt(row, kind, k)));
      const samples = COLORINGS[kind]?.samples ?? [];
      scale.replaceChildren(...samples.map((value) => paint(html("span", {}, String(value)), kind, value)));
    };
    choice.addEventListener("change", () => {
      coloring = choice.value;
      paintAll();
    });
    paintAll();

    let current = -1;
    const select = (k) => {
      spans[current]?.classList.remove("current");
      spans[k].classList.add("current");
      current = k;
      const values = kinds.map((kind) => `${COLORINGS[kind].name} ${valueAt(row, kind, k) ?? "none"}`);
      const which = `token ${k + 1} of ${spans.length}, ${JSON.stringify(row.tokens[k])}`;
      readout.textContent = `${which}: ${isInserted(row, k) ? "inserted" : values.join(", ") || "no values"}`;
    };
    const point = (event) => event.target.dataset.k && select(Number(event.target.dataset.k));
    text.addEventListener("pointerover", point);
    text.addEventListener("pointerdown", point);
    text.addEventListener("keydown", (event) => spans.length && stepBy(event, current, spans, select));
    return [html("p", { class: "controls" }, html("label", {}, "Color by ", choice), scale), text, readout];
  }

  function detailOf(row) {
    const part = (title, ...content) => [html("h3", {}, title), ...content];
    const text = (content) => html("p", { class: "text" }, content);
    const details = Object.entries(row.details).map(([name, value]) => `${name.replaceAll("_", " ")} ${value}`);
    const expected = row.answer ? part("Expected", text(row.answer)) : [];
    const response = part("Response", ...(row.tokens ? tokensOf(row) : [text(row.response)]));
    const note = html("p", { class: "note" }, details.join(" · "));
    return html("div", {}, ...part("Question", text(row.question)), ...expected, ...response, note);
  }

  // --- all responses ---

  function buildResponses() {
    if (!data.responses.length) return;
    const section = document.getElementById("responses");
    const [form, head, body] = ["form", "thead tr", "tbody"].map((selector) => section.querySelector(selector));
    const [back, next] = section.querySelectorAll(".pager button");
    const isGraded = data.responses.some((row) => "reward" in row);
    let page = 0;

    const texts = {
      run: (row) => data.runs[row.run],
      step: (row) => String(row.step),
      phase: (row) => row.phase,
      reward: (row) => ("reward" in row ? readable(row.reward) : ""),
      question: (row) => row.question,
      response: (row) => row.response,
    };
    const omitted = [data.runs.length < 2 && "run", !isGraded && "reward"];
    const columns = Object.keys(texts).filter((name) => !omitted.includes(name));
    head.append(...columns.map((name) => html("th", { scope: "col", class: name }, name)));

    const offer = (name) => {
      const label = new Map(data.responses.map((row) => [row[name], texts[name](row)]));
      const values = [...label.keys()].sort((a, b) => (a > b ? 1 : -1));
      form[name].append(...values.map((value) => html("option", { value }, label.get(value))));
      form[name].closest("label").hidden = values.length < 2;
    };
    ["run", "step", "phase"].forEach(offer);
    for (const name of ["min", "max"]) form[name].closest("label").hidden = !isGraded;

    function matches(row) {
      const { run, step, phase } = form;
      const [min, max, text] = [form.min.value, form.max.value, form.text.value.toLowerCase()];
      const chosen = [run, step, phase].every(({ name, value }) => value === "" || String(row[name]) === value);
      const isScored = typeof row.reward === "number";
      return (
        chosen &&
        (min === "" || (isScored && row.reward >= Number(min))) &&
        (max === "" || (isScored && row.reward <= Number(max))) &&
        `${row.question}\n${row.response}`.toLowerCase().includes(text)
      );
    }

    function rowsOf(row) {
      const [first, ...others] = columns;
      const open = html("button", { type: "button", "aria-expanded": "false" }, texts[first](row));
      const cells = others.map((name) => html("td", { class: name }, texts[name](row)));
      const line = html("tr", { class: "response" }, html("td", { class: first }, open), ...cells);
      const detail = html("td", { colspan: columns.length });
      const under = html("tr", { class: "under", hidden: "" }, detail);
      line.addEventListener("click", () => {
        under.hidden = !under.hidden;
        open.setAttribute("aria-expanded", String(!under.hidden));
        if (!detail.hasChildNodes()) detail.append(detailOf(row));
      });
      return [line, under];
    }

    function draw(to) {
      const matching = data.responses.filter(matches);
      const last = Math.max(0, Math.ceil(matching.length / ROWS_PER_PAGE) - 1);
      page = Math.min(Math.max(0, to), last);
      const from = page * ROWS_PER_PAGE;
      const shown = matching.slice(from, from + ROWS_PER_PAGE);
      body.replaceChildren(...shown.flatMap(rowsOf));
      const count = matching.length ? `${from + 1} to ${from + shown.length} of ${matching.length}` : "no matches";
      section.querySelector(".count").textContent = count;
      [back.disabled, next.disabled] = [page === 0, page === last];
    }

    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", () => draw(0));
    form.addEventListener("reset", () => setTimeout(() => draw(0))); // the form empties its fields after this event
    back.addEventListener("click", () => draw(page - 1));
    next.addEventListener("click", () => draw(page + 1));
    section.querySelector(".browser").hidden = false;
    draw(0);
  }

  buildCharts();
  buildResponses();
})();
