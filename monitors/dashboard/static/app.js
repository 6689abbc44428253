// The dashboard's own script: refreshes while the tab is visible, fills dialogs, draws the charts.
"use strict";
(() => {
  const REFRESH_MS = 2000;
  const DASHES = [[], [7, 4], [2, 3], [10, 3, 2, 3], [4, 2], [12, 4], [1, 2], [6, 2, 2, 2]];
  const byId = (id) => document.getElementById(id);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  let range = "1h";
  let data = null;
  let charts = [];
  let lastSeen = Date.now();

  // -- refreshing ---------------------------------------------------------------------------------
  function refresh() {
    if (document.visibilityState !== "visible") return;
    htmx.trigger(document.body, "refresh");
    loadSeries();
    const stale = Date.now() - lastSeen > 3 * REFRESH_MS;
    byId("freshness").classList.toggle("stale", stale);
    const text = stale ? "no answer for " + Math.round((Date.now() - lastSeen) / 1000) + " s" : "up to date";
    if (byId("freshness").textContent !== text) byId("freshness").textContent = text;
  }
  setInterval(refresh, REFRESH_MS);
  document.addEventListener("visibilitychange", refresh);

  let lastHtml = "";
  document.addEventListener("htmx:beforeSwap", (event) => {
    if (event.detail.target.id !== "top") return;
    lastSeen = Date.now();
    if (event.detail.serverResponse === lastHtml) event.detail.shouldSwap = false; // keeps selection and focus
    else lastHtml = event.detail.serverResponse;
    if (event.detail.xhr.status >= 400) event.detail.shouldSwap = false;
  });

  // -- dialogs ------------------------------------------------------------------------------------
  document.addEventListener("click", (event) => {
    const opener = event.target.closest("[data-dialog]");
    if (opener) openDialog(byId(opener.dataset.dialog), opener.dataset);
    const closer = event.target.closest("[data-close]");
    if (closer) closer.closest("dialog").close();
  });

  function openDialog(dialog, given) {
    const form = dialog.querySelector("form");
    form.reset();
    form.elements.expected_generation.value = given.generation;
    if (form.elements.version) form.elements.version.value = given.version;
    for (const place of dialog.querySelectorAll("[data-fill]")) place.textContent = given[place.dataset.fill] || "";
    dialog.querySelector(".result").textContent = "";
    dialog.querySelector("[type=submit]").disabled = false;
    dialog.showModal();
  }

  document.body.addEventListener("moved", (event) => {
    const dialog = event.target.closest("dialog");
    if (dialog) {
      dialog.querySelector("[type=submit]").disabled = true;
      setTimeout(() => dialog.close(), 900);
    }
    refresh();
  });
  document.addEventListener("htmx:responseError", (event) => {
    const dialog = event.target.closest("dialog"); // the page must be looked at again before another try
    if (dialog && event.detail.xhr.status === 409) dialog.querySelector("[type=submit]").disabled = true;
  });

  // -- charts -------------------------------------------------------------------------------------
  for (const button of document.querySelectorAll("[data-range]")) {
    button.addEventListener("click", () => {
      range = button.dataset.range;
      for (const other of document.querySelectorAll("[data-range]"))
        other.setAttribute("aria-pressed", String(other === button));
      loadSeries();
    });
  }
  byId("toggle-table").addEventListener("click", () => {
    const hidden = !byId("series-table").hidden;
    byId("series-table").hidden = hidden;
    byId("toggle-table").setAttribute("aria-expanded", String(!hidden));
    byId("toggle-table").textContent = hidden ? "Show as table" : "Hide table";
    if (data) fillTable();
  });

  let loading = false;
  async function loadSeries() {
    if (loading) return;
    loading = true;
    const asked = range;
    try {
      const reply = await fetch("/api/series?range=" + asked, { headers: { Accept: "application/json" } });
      if (!reply.ok) return;
      const text = await reply.text();
      if (asked === range && text !== loadSeries.last) {
        loadSeries.last = text;
        data = JSON.parse(text);
        draw();
      }
    } catch { /* the freshness line says it */ } finally {
      loading = false;
      if (asked !== range) loadSeries();
    }
  }

  function look(index) {
    const version = data.versions[index].version;
    return { stroke: colour("--s" + (version % 8)), dash: DASHES[version % 8] };
  }

  function draw() {
    const empty = data.versions.length === 0;
    byId("chart-empty").hidden = !empty;
    byId("charts").hidden = empty;
    for (const chart of charts) chart.destroy();
    charts = [];
    fillLegend();
    if (!byId("series-table").hidden) fillTable();
    if (empty) return;
    charts.push(chart("chart-acceptance", "acceptance", 3, [0, 1], 0.05));
    charts.push(chart("chart-tokens", "tokens_per_round", 2, [1, 17], 0.2));
  }

  function chart(id, field, digits, limits, least) {
    const box = byId(id);
    const few = data.times.length < 40;
    const series = data.versions.map((line, index) => ({
      label: "v" + line.version, ...look(index), width: 2, spanGaps: false,
      points: { show: few, size: 5, fill: look(index).stroke, ...(few ? {} : { filter: () => lonely(line[field]) }) },
      value: (plot, value) => (value === null ? "–" : value.toFixed(digits)),
    }));
    const axis = { stroke: colour("--soft"), font: "12px Inter, system-ui, sans-serif", grid: { stroke: colour("--faint"), width: 1 }, ticks: { show: false } };
    return new uPlot({
      width: byId("charts").clientWidth, height: 180, legend: { show: false },
      cursor: { sync: { key: "time" }, drag: { x: false, y: false }, points: { size: 7 } },
      padding: [18, 8, 0, 0],
      scales: { x: { range: timeRange }, y: { range: (plot, low, high) => valueRange(low, high, limits, least) } },
      axes: [{ ...axis, grid: { show: false }, space: 70, size: 32, values: (plot, ticks, axisIndex, space, step) => ticks.map((tick) => tickTime(tick, step)) }, { ...axis, size: 52, values: (plot, ticks) => ticks.map((tick) => tick.toFixed(field === "acceptance" ? 2 : 1)) }],
      series: [{}, ...series],
      hooks: { draw: [drawMarks], setCursor: [showValues] },
    }, [data.times, ...data.versions.map((line) => line[field])], box);
  }

  // A value between two gaps has no line; without a dot nobody would see it.
  function lonely(values) {
    const there = (index) => values[index] !== null && values[index] !== undefined;
    return [...values.keys()].filter((index) => there(index) && !there(index - 1) && !there(index + 1));
  }

  function timeRange(plot, low, high) {
    const room = Math.max(120 - (high - low), (high - low) * 0.02, 1) / 2;
    return [low - room, high + room];
  }

  function valueRange(low, high, limits, least) {
    const room = Math.max((high - low) * 0.12, least);
    return [Math.max(limits[0], low - room), Math.min(limits[1], high + room)];
  }

  // A promotion is a solid mark, a roll back a dashed one; each says the version that became live.
  function drawMarks(plot) {
    const { ctx, bbox } = plot;
    const ratio = devicePixelRatio || 1;
    let free = -Infinity;
    ctx.save();
    ctx.textAlign = "left";
    ctx.textBaseline = "alphabetic";
    ctx.font = 11 * ratio + "px Inter, system-ui, sans-serif";
    for (const mark of data.marks) {
      const x = plot.valToPos(mark.at_s, "x", true);
      if (x < bbox.left || x > bbox.left + bbox.width) continue;
      const back = mark.verb === "roll_back";
      ctx.strokeStyle = ctx.fillStyle = colour(back ? "--bad" : "--soft");
      ctx.lineWidth = ratio;
      ctx.setLineDash(back ? [4 * ratio, 3 * ratio] : []);
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
      const text = (back ? "back to v" : "v") + mark.version + (back ? "" : " live");
      const width = ctx.measureText(text).width;
      const left = Math.min(Math.max(x - width / 2, bbox.left), bbox.left + bbox.width - width);
      if (left < free) continue; // no room: the audit log has it
      free = left + width + 8 * ratio;
      ctx.fillText(text, left, bbox.top - 6 * ratio);
    }
    ctx.restore();
  }

  function fillLegend(at) {
    const place = byId("legend");
    place.replaceChildren();
    data.versions.forEach((line, index) => {
      const item = document.createElement("span");
      const swatch = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      const stroke = document.createElementNS("http://www.w3.org/2000/svg", "line");
      for (const [name, value] of Object.entries({ x1: 0, x2: 26, y1: 4, y2: 4, "stroke-width": 2.5, stroke: look(index).stroke, "stroke-dasharray": look(index).dash.join(" ") }))
        stroke.setAttribute(name, value);
      swatch.append(stroke);
      const value = at === undefined || at === null ? null : line.acceptance[at];
      const shown = value === null || value === undefined ? "" : "  " + value.toFixed(3) + " at " + line.tokens_per_round[at].toFixed(2) + " tokens, n = " + line.requests[at];
      item.append(swatch, "v" + line.version + (line.version === 0 ? " base draft" : "") + shown);
      place.append(item);
    });
    if (at !== undefined && at !== null) {
      const moment = document.createElement("span");
      moment.textContent = clockTime(data.times[at]);
      place.prepend(moment);
    }
  }

  function showValues(plot) {
    fillLegend(plot.cursor.idx);
  }

  function clockTime(at) {
    return new Date(at * 1000).toLocaleString(undefined, { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });
  }

  function tickTime(at, step) {
    const moment = new Date(at * 1000);
    if (step >= 86400) return moment.toLocaleDateString(undefined, { month: "short", day: "numeric" });
    const time = { hour: "2-digit", minute: "2-digit", hourCycle: "h23", ...(step < 60 ? { second: "2-digit" } : {}) };
    return moment.toLocaleTimeString(undefined, time);
  }

  function fillTable() {
    const table = document.createElement("table");
    const head = table.createTHead().insertRow();
    for (const name of ["Until", "Version", "Acceptance", "Tokens per round", "Requests"]) {
      const cell = document.createElement("th");
      cell.scope = "col";
      if (!["Until", "Version"].includes(name)) cell.className = "num";
      cell.textContent = name;
      head.append(cell);
    }
    const body = table.createTBody();
    for (let index = data.times.length - 1; index >= 0; index--) {
      for (const line of data.versions) {
        if (line.acceptance[index] === null) continue;
        const row = body.insertRow();
        const values = [clockTime(data.times[index]), "v" + line.version, line.acceptance[index].toFixed(3), line.tokens_per_round[index].toFixed(2), String(line.requests[index])];
        values.forEach((value, column) => {
          const cell = row.insertCell();
          cell.textContent = value;
          if (column > 1) cell.className = "num";
        });
      }
    }
    byId("series-table").replaceChildren(table);
  }

  new ResizeObserver(() => {
    for (const plot of charts) plot.setSize({ width: byId("charts").clientWidth, height: plot.height });
  }).observe(byId("charts"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (data) draw(); });
  addEventListener("load", loadSeries);
})();
