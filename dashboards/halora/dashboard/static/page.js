// Draws the figures, and turns clicks, boxes and brushes on them into the form that the server answers.
"use strict";
(() => {
  const drawn = new Map();
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const ticks = (place) => Math.min(Math.max(Math.floor(place.clientWidth / 90), 3), 10);

  function coloured(layout) {
    const axis = { gridcolor: style("--grid"), zerolinecolor: style("--line"), linecolor: style("--line"), automargin: true };
    return {
      ...layout,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { ...layout.font, color: style("--text") },
      xaxis: { ...layout.xaxis, ...axis },
      yaxis: { ...layout.yaxis, ...axis },
      hoverlabel: { bgcolor: style("--raised"), bordercolor: style("--line"), font: { color: style("--text") } },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: style("--soft"), activecolor: style("--text") },
      uirevision: "kept",
      selections: [],
      selectionrevision: String(performance.now()),
      dragmode: layout.selectable ? "select" : "zoom",
    };
  }

  function draw(place) {
    const chart = JSON.parse(document.getElementById(place.dataset.figure).textContent);
    const selectable = "selectable" in place.dataset;
    const config = { responsive: true, displaylogo: false, showTips: false, displayModeBar: selectable,
      modeBarButtons: [["select2d", "zoom2d", "pan2d", "resetScale2d"]], doubleClick: "reset" };
    const { height, ...rest } = chart.layout;
    const layout = coloured({ ...rest, selectable, autosize: true });
    layout.xaxis.nticks = ticks(place);
    const old = drawn.get(place.id);
    if (old && old !== place) {  // the figure was there before: keep its zoom
      place.replaceWith(old);
      place = old;
    }
    place.style.height = `${height}px`;  // of the place, not of the layout: Plotly forgets that one as the window changes
    const fresh = !place.classList.contains("js-plotly-plot");
    return Plotly.react(place, chart.data, layout, config).then(() => {
      drawn.set(place.id, place);
      if (fresh && selectable) {
        place.on("plotly_click", (event) => pick(event.points.map((point) => point.customdata), true));
        place.on("plotly_selected", (event) => {
          if (event && event.points.length) pick(event.points.map((point) => point.customdata), false);
        });
      }
    });
  }

  function drawAll() {
    const ready = () => { document.body.dataset.ready = String(Number(document.body.dataset.ready || 0) + 1); };
    if (!window.Plotly) return ready();
    const figures = [...document.querySelectorAll("[data-figure]")];
    return Promise.all(figures.map(draw)).then(ready);
  }

  function spaced() {  // Plotly's ticks of a logarithmic axis run into each other where there is little room
    for (const place of drawn.values()) {
      if (place.layout.xaxis.nticks !== ticks(place)) Plotly.relayout(place, { "xaxis.nticks": ticks(place) });
    }
  }

  // The form of a sweep's page: shortlisted trials and filters are its inputs.
  const form = () => document.getElementById("constraints");

  function added(name, value) {
    const input = document.createElement("input");
    Object.assign(input, { type: "hidden", name, value });
    input.dataset.added = "";
    form().append(input);
  }

  function pick(numbers, toggle) {
    for (const number of new Set(numbers.filter((each) => each !== undefined))) {
      const inputs = [...form().elements].filter((input) => input.name === "pick" && input.value === String(number));
      const chosen = inputs.filter((input) => input.type === "hidden" || input.checked);
      if (chosen.length && toggle) chosen.forEach((input) => (input.type === "hidden" ? input.remove() : (input.checked = false)));
      else if (!chosen.length && inputs.length) inputs[0].checked = true;
      else if (!chosen.length) added("pick", number);
    }
    form().requestSubmit();
  }

  // Brushing an axis: what lies between the two heights becomes conditions on its field.
  function valueAt(axis, place) {
    if (axis.choices.length) return Math.round(place * (axis.choices.length - 1));
    const value = axis.log ? axis.low * (axis.high / axis.low) ** place : axis.low + place * (axis.high - axis.low);
    return Number(value.toPrecision(4));
  }

  function brushed(axis, from, to) {
    const fields = [axis.field, axis.label];
    for (const input of [...form().elements].filter((each) => each.name === "filter" && each.type === "hidden")) {
      const match = /^\s*(.+?)\s*(<=|>=|!=|=|<|>)/.exec(input.value);
      if (match && fields.includes(match[1])) input.remove();
    }
    if (from !== to) {
      const [low, high] = [valueAt(axis, Math.min(from, to)), valueAt(axis, Math.max(from, to))];
      if (axis.choices.length) added("filter", `${axis.field}=${axis.choices.slice(low, high + 1).join("|")}`);
      else {
        added("filter", `${axis.field}>=${axis.whole ? Math.ceil(low) : low}`);
        added("filter", `${axis.field}<=${axis.whole ? Math.floor(high) : high}`);
      }
    }
    form().requestSubmit();
  }

  // Ask whether there is anything new as often as the page says, while somebody looks at it.
  let due;
  function ask() {
    const poll = document.getElementById("poll");
    if (poll) window.htmx.trigger(poll, "renew");
    wait();
  }
  function wait() {
    clearTimeout(due);
    const poll = document.getElementById("poll");
    if (poll && window.htmx && document.visibilityState === "visible") due = setTimeout(ask, 1000 * poll.dataset.every);
  }
  document.addEventListener("visibilitychange", () => (document.visibilityState === "visible" ? ask() : wait()));

  document.addEventListener("pointerdown", (event) => {
    const grab = event.target.closest && event.target.closest("[data-axis]");
    if (!grab) return;
    event.preventDefault();
    const svg = grab.ownerSVGElement;
    const axis = JSON.parse(grab.dataset.axis);
    const { top, bottom } = svg.dataset;
    const placeOf = (moved) => {
      const box = svg.getBoundingClientRect();
      const y = ((moved.clientY - box.top) / box.height) * svg.viewBox.baseVal.height;
      return Math.min(Math.max((bottom - y) / (bottom - top), 0), 1);
    };
    const from = placeOf(event);
    const brush = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    brush.setAttribute("class", "brush");
    brush.setAttribute("x", Number(grab.getAttribute("x")) + 6);
    brush.setAttribute("width", 16);
    grab.parentNode.insertBefore(brush, grab);
    const move = (moved) => {
      const [low, high] = [from, placeOf(moved)].sort((a, b) => a - b);
      brush.setAttribute("y", bottom - high * (bottom - top));
      brush.setAttribute("height", (high - low) * (bottom - top));
    };
    const end = (moved) => {
      document.removeEventListener("pointermove", move);
      const to = placeOf(moved);
      brushed(axis, from, Math.abs(to - from) < 0.02 ? from : to);
    };
    document.addEventListener("pointermove", move);
    document.addEventListener("pointerup", end, { once: true });
  });

  document.addEventListener("change", (event) => {  // inputs of the form that stand elsewhere, in the table
    const owner = event.target.form;
    if (owner && owner === form() && !owner.contains(event.target)) owner.requestSubmit();
  });
  document.addEventListener("input", (event) => {
    const output = event.target.parentNode && event.target.parentNode.querySelector(":scope > output");
    if (output) output.textContent = event.target.value;
  });
  document.addEventListener("htmx:configRequest", (event) => {  // no empty fields in the address
    const given = event.detail.formData;
    for (const name of new Set(given.keys())) {
      const filled = given.getAll(name).filter((value) => value !== "");
      given.delete(name);
      filled.forEach((value) => given.append(name, value));
    }
  });
  document.addEventListener("htmx:afterSettle", () => {  // the answer holds what was added and typed here
    document.querySelectorAll("[data-added]").forEach((input) => input.remove());
    const typed = document.querySelector("#constraints input[list]");
    if (typed && typed !== document.activeElement) typed.value = "";
    drawAll();
    wait();
  });
  document.addEventListener("DOMContentLoaded", () => {
    drawAll();
    wait();
  });
  addEventListener("resize", spaced);
  for (const media of ["(prefers-color-scheme: dark)", "print"]) matchMedia(media).addEventListener("change", drawAll);
})();
