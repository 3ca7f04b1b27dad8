"use strict";
// The fleet, live. Nothing is loaded from elsewhere, nothing is written as markup: all text goes in as text.
const SYMBOLS = { True: "✓", False: "✗", Unknown: "?" };
const HELD = "‖";
const $ = (id) => document.getElementById(id);
const store = { // private windows may have none
  get: (where, key) => { try { return where.getItem(key); } catch { return null; } },
  set: (where, key, value) => { try { where.setItem(key, value); } catch { /* it lasts as long as the page */ } },
};
let language = store.get(localStorage, "fleet-language") || (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en");
let token = store.get(sessionStorage, "fleet-token") || "";
let fleet = null, seenAt = null, connection = { state: "connecting" }, opened = null;
const t = (key, ...values) => { const found = WORDS[language][key]; return typeof found === "function" ? found(...values) : found ?? key; };
const locale = () => (language === "zh" ? "zh-CN" : navigator.language.startsWith("en") ? navigator.language : "en");

// --- small parts -----------------------------------------------------------------------------------

function make(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "on") for (const [event, act] of Object.entries(value)) node.addEventListener(event, act);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}
const plain = (value) => (typeof value === "string" ? value : value === null || value === undefined ? "–" : typeof value === "object" ? JSON.stringify(value, null, 1) : String(value));
const short = (value) => { const text = plain(value); return /^[0-9a-f]{64}$/.test(text) ? text.slice(0, 12) + "…" : text; };
const byName = (a, b) => a.localeCompare(b, "en", { numeric: true });

function length(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 60) return `${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} ${t("seconds")}`;
  const [large, name, small, rest] = [[86400, "days", 3600, "hours"], [3600, "hours", 60, "minutes"], [60, "minutes", 1, "seconds"]].find(([unit]) => seconds >= unit);
  const left = Math.floor((seconds % large) / small);
  return `${Math.floor(seconds / large)} ${t(name)}${left ? ` ${left} ${t(rest)}` : ""}`;
}
function relative(moment, ahead) { // what is to come is never past: it is late by the time somebody hears of it
  const away = (moment - Date.now()) / 1000, seconds = ahead ? Math.max(0, away) : away, size = Math.abs(seconds);
  const [unit, per] = size < 60 ? ["second", 1] : size < 3600 ? ["minute", 60] : size < 86400 ? ["hour", 3600] : ["day", 86400];
  return new Intl.RelativeTimeFormat(locale(), { numeric: "auto" }).format(Math.round(seconds / per), unit);
}
const local = (moment) => new Intl.DateTimeFormat(locale(), { dateStyle: "medium", timeStyle: "medium" }).format(moment);
function when(text, ahead = false) { // kept up to date by tick()
  const moment = new Date(text);
  return make("time", { datetime: text, title: local(moment), "data-at": "", "data-ahead": ahead }, relative(moment, ahead));
}
function withTime(key, text) { // a sentence of ours around a time that keeps moving
  const [before, after] = t(key, "\u0000").split("\u0000");
  return make("span", {}, before, when(text), after);
}
function tick() {
  for (const node of document.querySelectorAll("time[data-at]")) {
    const now = relative(new Date(node.dateTime), "ahead" in node.dataset);
    if (node.textContent !== now) node.textContent = now;
  }
  if (connection.state === "lost") showConnection();
}

// --- the matrix ------------------------------------------------------------------------------------

let cells = new Map(), grid = [], shape = "", cursor = [0, 0];

function wanted() {
  const words = $("filter").value.trim().toLowerCase().split(/\s+/).filter(Boolean), only = $("problems").checked;
  const matches = (row) => words.every((word) => row.issue_key.toLowerCase().includes(word));
  const nodes = [], columns = new Map();
  for (const name of Object.keys(fleet.nodes).sort(byName)) {
    const rows = fleet.nodes[name].resources.filter((row) => matches(row) && (!only || row.status !== "True" || row.suspended));
    if (!rows.length) continue;
    nodes.push([name, new Map(rows.map((row) => [`${row.kind}/${row.name}`, row]))]);
    for (const row of rows) columns.set(`${row.kind}/${row.name}`, [row.kind, row.name]);
  }
  const sorted = [...columns.entries()].sort(([, a], [, b]) => byName(a[0], b[0]) || byName(a[1], b[1]));
  return { nodes, columns: sorted.map(([key, [kind, name]]) => ({ key, kind, name })) };
}
function label(row) {
  return `${row.node ?? row.issue_key.split("/")[0]}, ${row.kind}/${row.name}: ${t(row.status)}${row.suspended ? `, ${t("suspendedBecause", row.suspended)}` : ""}${row.message ? `. ${row.message}` : ""}`;
}
function paint(cell, row, first) {
  const text = SYMBOLS[row.status] + (row.suspended ? HELD : ""), said = label(row);
  const looks = `${row.status.toLowerCase()}${row.suspended ? " held" : ""}${first ? " first" : ""}`;
  const differs = cell.dataset.looks !== undefined && cell.dataset.looks !== looks;
  if (cell.textContent !== text) cell.textContent = text;
  if (cell.getAttribute("aria-label") !== said) { cell.setAttribute("aria-label", said); cell.title = said; }
  if (cell.dataset.looks !== looks) cell.className = looks + (differs ? " changed" : "");
  cell.dataset.looks = looks;
}
function showMatrix() {
  const { nodes, columns } = wanted();
  $("empty").hidden = nodes.length > 0;
  $("empty").textContent = Object.keys(fleet.nodes).length ? t("noMatch") : t("emptyFleet");
  $("scroll").hidden = $("legend").hidden = $("keys").hidden = nodes.length === 0;
  const now = JSON.stringify([language, columns, nodes.map(([name, rows]) => [name, [...rows.keys()]])]);
  if (now !== shape) { shape = now; build(nodes, columns); }
  const first = new Set(columns.filter((column, index) => index === 0 || columns[index - 1].kind !== column.kind).map((column) => column.key));
  for (const [name, rows] of nodes) {
    for (const [key, row] of rows) paint(cells.get(`${name}/${key}`), row, first.has(key));
    const score = cells.get(name), said = `${fleet.nodes[name].score} %`;
    if (score.textContent !== said) score.textContent = said;
  }
}
function build(nodes, columns) {
  const held = document.activeElement?.closest?.("#matrix td")?.dataset.key;
  cells = new Map(); grid = [];
  const kinds = make("tr", {}, make("th", { class: "corner", rowspan: 2, scope: "col" }, t("nodes"))), names = make("tr");
  columns.forEach((column, index) => {
    column.first = index === 0 || columns[index - 1].kind !== column.kind;
    if (column.first) kinds.append(make("th", { scope: "colgroup", class: "first", colspan: columns.filter((c) => c.kind === column.kind).length }, column.kind));
    names.append(make("th", { scope: "col", class: column.first ? "first" : null }, column.name));
  });
  const body = make("tbody");
  for (const [name, rows] of nodes) {
    const score = make("span", { class: "score" }), tr = make("tr", {}, make("th", { scope: "row", title: name }, name, " ", score)), line = [];
    cells.set(name, score);
    for (const column of columns) {
      const cell = make("td", { tabindex: -1, "data-key": `${name}/${column.key}` });
      if (rows.has(column.key)) cells.set(`${name}/${column.key}`, cell);
      else { cell.className = "none" + (column.first ? " first" : ""); cell.textContent = "·"; cell.setAttribute("aria-label", `${name}, ${column.key}: ${t("none")}`); }
      line.push(cell); tr.append(cell);
    }
    grid.push(line); body.append(tr);
  }
  $("matrix").replaceChildren(make("thead", {}, kinds, names), body);
  $("matrix").setAttribute("aria-rowcount", nodes.length + 2);
  cursor = [Math.min(cursor[0], Math.max(0, grid.length - 1)), Math.min(cursor[1], Math.max(0, columns.length - 1))];
  grid.forEach((line, y) => line.forEach((cell, x) => { if (cell.dataset.key === held) cursor = [y, x]; }));
  if (grid.length) grid[cursor[0]][cursor[1]].tabIndex = 0;
  if (held && grid.length) grid[cursor[0]][cursor[1]].focus();
}
function move(y, x) {
  grid[cursor[0]][cursor[1]].tabIndex = -1;
  cursor = [Math.max(0, Math.min(grid.length - 1, y)), Math.max(0, Math.min(grid[0].length - 1, x))];
  const cell = grid[cursor[0]][cursor[1]];
  cell.tabIndex = 0; cell.focus({ preventScroll: true }); cell.scrollIntoView({ block: "nearest", inline: "nearest" });
}
function onKey(event) {
  if (!grid.length || event.altKey || event.metaKey) return;
  const [y, x] = cursor, far = event.ctrlKey;
  const act = {
    ArrowUp: () => move(y - 1, x), ArrowDown: () => move(y + 1, x), ArrowLeft: () => move(y, x - 1), ArrowRight: () => move(y, x + 1),
    Home: () => move(far ? 0 : y, 0), End: () => move(far ? grid.length - 1 : y, grid[0].length - 1),
    PageUp: () => move(y - 10, x), PageDown: () => move(y + 10, x), Enter: () => show(grid[y][x].dataset.key), " ": () => show(grid[y][x].dataset.key),
  }[event.key];
  if (act) { event.preventDefault(); act(); }
}
function showLegend() {
  $("legend").replaceChildren(...["True", "False", "Unknown"].map((key) => make("span", {}, make("b", { class: key.toLowerCase(), "aria-hidden": "true" }, ` ${SYMBOLS[key]} `), ` ${t(key)}`)),
    make("span", {}, make("b", { "aria-hidden": "true" }, HELD), ` ${t("held")}`), make("span", {}, make("b", { "aria-hidden": "true" }, "·"), ` ${t("none")}`));
}

// --- the rest of the page --------------------------------------------------------------------------

const all = () => Object.entries(fleet.nodes).flatMap(([node, found]) => found.resources.map((row) => ({ node, ...row })));

function showVerdict() {
  const wrong = fleet.counts.False || 0, unknown = fleet.unknown_nodes.length, parts = [];
  if (wrong) parts.push(t("notDesired", wrong));
  if (unknown) parts.push(t("unknownNodes", unknown));
  const some = Object.keys(fleet.nodes).length > 0, other = (fleet.counts.Unknown || 0) > 0;
  $("verdict").textContent = parts.join(language === "zh" ? "，" : ", ") || (!some ? t("nothing") : other ? `${fleet.counts.Unknown} ${t("Unknown")}` : `✓ ${t("allGood")}`);
  $("verdict").className = `verdict ${wrong ? "bad" : unknown || other ? "unknown" : some ? "good" : ""}`;
  document.title = `${wrong || unknown ? `(${wrong + unknown}) ` : ""}${t("fleet")}`;
}
function showNotices() {
  const rows = fleet.reasons.map((reason) => make("p", { class: "notice" }, `⚠\uFE0E ${WORDS[language].reasons[reason.code] ?? reason.message}`));
  if ($("notices").textContent !== rows.map((row) => row.textContent).join("")) $("notices").replaceChildren(...rows);
}
function showNumbers() {
  const last = fleet.last_pass, daemon = fleet.daemon, next = daemon.next_pass || fleet.next_pass;
  const alerts = Object.entries(fleet.open_alerts).filter(([, n]) => n), total = all().length;
  const cell = (title, value, ...small) => make("div", {}, make("dt", {}, title), make("dd", {}, value, make("small", {}, ...small.filter(Boolean))));
  const passing = daemon.running_since ? make("span", {}, `${t("underWay")} `, make("small", {}, withTime("since", daemon.running_since))) : null;
  $("numbers").replaceChildren(
    cell(t("share"), fleet.score === null ? "–" : `${fleet.score} %`, t("resources", total)),
    cell(t("nodes"), String(Object.keys(fleet.nodes).length), fleet.unknown_nodes.length ? t("unknownOf", fleet.unknown_nodes.length) : ""),
    cell(t("openAlerts"), String(alerts.reduce((sum, [, n]) => sum + n, 0)), alerts.map(([level, n]) => `${n} × ${level}`).join(", ")),
    cell(t("lastPass"), last ? when(last.started) : t("noPass"), last ? `${WORDS[language].results[last.exit_code] ?? last.exit_code}, ${t("took", length(last.seconds))}` : ""),
    cell(t("nextPass"), passing ?? (next ? when(next, true) : t("onDemand")), daemon.queue ? t("queue", daemon.queue) : ""),
    cell(t("revision"), make("code", {}, (daemon.revision || last?.revision || "–").slice(0, 12))),
  );
}
function sides(changes) {
  if (!changes?.length) return null;
  const body = make("tbody", {}, ...changes.map((change) => make("tr", {},
    make("th", { scope: "row" }, change.field, change.note ? make("div", { class: "hint" }, change.note) : null),
    make("td", { class: "want", title: plain(change.desired) }, short(change.desired)), make("td", { class: "have", title: plain(change.observed) }, short(change.observed)))));
  const head = make("thead", {}, make("tr", {}, ...["field", "desired", "observed"].map((key) => make("th", { scope: "col" }, t(key)))));
  return make("table", { class: "sides" }, head, body);
}
const opener = (key) => make("button", { type: "button", class: "link", on: { click: () => show(key) } }, key);

function showDrifts() {
  const cards = [];
  for (const node of [...fleet.unknown_nodes].sort(byName)) {
    const rows = fleet.nodes[node].resources;
    cards.push(make("article", { class: "card unknown-card" }, make("h3", {}, node, " ", make("span", { class: "badge unknown" }, `? ${t("Unknown")}`)),
      make("p", {}, `${t("allUnknown", rows.length)}, `, withTime("since", rows.map((row) => row.since).sort().at(-1))), make("p", {}, rows[0].message)));
  }
  for (const row of all().filter((row) => row.status !== "True" && !fleet.unknown_nodes.includes(row.node)).sort((a, b) => byName(a.issue_key, b.issue_key))) {
    cards.push(make("article", { class: `card ${row.status === "Unknown" ? "unknown-card" : row.suspended ? "held-card" : ""}` },
      make("h3", {}, opener(row.issue_key), " ", make("span", { class: `badge ${row.status.toLowerCase()}` }, `${SYMBOLS[row.status]} ${t(row.status)}`)),
      make("p", { class: "hint" }, withTime("since", row.since)),
      row.suspended ? make("p", {}, make("span", { class: "badge heldbadge" }, `${HELD} ${t("suspendedBecause", row.suspended)}`)) : null,
      row.message && !(row.suspended && row.message.endsWith(row.suspended)) ? make("p", {}, row.message) : null, sides(row.changes)));
  }
  $("drifts").replaceChildren(...(cards.length ? cards : [make("p", { class: "hint" }, Object.keys(fleet.nodes).length ? `✓ ${t("noDrift")}` : t("emptyFleet"))]));
}
function showAlerts() {
  const rows = fleet.alerts.map((alert) => make("article", { class: `card ${alert.level.toLowerCase()}` },
    make("h3", {}, make("span", { class: "level" }, alert.level), " ", alert.key.split("/").length > 2 ? opener(alert.key) : alert.key, ` · ${alert.reason}`),
    make("p", {}, alert.detail), alert.advice ? make("p", {}, `→ ${alert.advice}`) : null,
    make("p", { class: "hint" }, withTime("since", alert.opened), alert.occurrences > 1 ? ` · ${t("raised", alert.occurrences)}` : "")));
  $("alerts").replaceChildren(...(rows.length ? rows : [make("p", { class: "hint" }, `✓ ${t("noAlerts")}`)]));
}
function ending(episode) {
  const tried = episode.attempts ? t("attempts", episode.attempts, episode.failed) : "";
  const said = episode.state === "fixed" ? t("fixedAfter", length(episode.seconds)) : episode.state === "open" ? t("openFor", length((Date.now() - new Date(episode.began)) / 1000)) : t("over");
  const mark = { fixed: "✓", open: "✗", over: "–" }[episode.state];
  return [`${mark} ${said}`, tried || (episode.state === "fixed" ? t("byItself") : ""), episode.state === "fixed" ? "" : episode.reason].filter(Boolean).join(" · ");
}
function showEpisodes() {
  $("episodes").replaceChildren(...fleet.episodes.map((episode) => make("li", {}, when(episode.began), make("span", {}, opener(episode.resource)),
    make("span", { class: `how ${episode.state}-episode` }, ending(episode)))));
  if (!fleet.episodes.length) $("episodes").replaceChildren(make("li", {}, make("span", { class: "hint" }, t("noEpisodes"))));
  showStrip();
}
function showStrip() {
  const DAYS = 7, WIDTH = 1000, ROW = 12, end = Date.now(), begin = end - DAYS * 86400e3;
  const x = (moment) => Math.max(0, (WIDTH * (moment - begin)) / (end - begin));
  const shown = fleet.episodes.map((e) => ({ ...e, from: new Date(e.began), to: e.ended ? new Date(e.ended) : e.state === "open" ? new Date(end) : new Date(e.began) })).filter((e) => e.to > begin).sort((a, b) => a.from - b.from);
  if (!shown.length) { $("strip").replaceChildren(); return; }
  const lanes = [];
  for (const episode of shown) { // those that overlap stand below each other
    const at = x(episode.from);
    let lane = lanes.findIndex((until) => until < at);
    if (lane < 0) lane = Math.min(lanes.length, 11);
    episode.lane = lane; lanes[lane] = Math.max(x(episode.to), at + 6) + 3;
  }
  const height = 22 + lanes.length * ROW;
  const svg = (name, attributes, text) => { const node = document.createElementNS("http://www.w3.org/2000/svg", name); for (const [k, v] of Object.entries(attributes)) node.setAttribute(k, v); if (text) node.textContent = text; return node; };
  const open = shown.filter((e) => e.state === "open").length;
  const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": t("stripLabel", shown.length - open, open) });
  for (let day = 0; day < DAYS; day++) {
    const midnight = new Date(end); midnight.setHours(0, 0, 0, 0); midnight.setDate(midnight.getDate() - day);
    if (midnight < begin) continue;
    drawing.append(svg("line", { x1: x(midnight), x2: x(midnight), y1: 0, y2: height - 16, class: "grid" }),
      svg("text", { x: x(midnight) + 3, y: height - 4 }, new Intl.DateTimeFormat(locale(), { weekday: "short", day: "numeric" }).format(midnight)));
  }
  for (const e of shown) {
    const bar = svg("rect", { x: x(e.from), y: 2 + e.lane * ROW, width: Math.max(5, x(e.to) - x(e.from)), height: ROW - 4, rx: 2, class: e.state });
    bar.append(svg("title", {}, `${e.resource}: ${ending(e)}`)); drawing.append(bar);
  }
  $("strip").replaceChildren(drawing);
}
function showRepairs() {
  if (!fleet.repairs.length) { $("repairs").replaceChildren(make("p", { class: "hint" }, t("noRepairs"))); return; }
  const head = make("thead", {}, make("tr", {}, ...["kind", "repaired", "mean", "median", "p95", "longest", "open"].map((key) => make("th", { scope: "col" }, t(key)))));
  const rows = fleet.repairs.map((row) => make("tr", {}, make("th", { scope: "row" }, row.kind), make("td", {}, String(row.count)),
    ...["mean", "median", "p95", "longest"].map((key) => make("td", {}, length(row[`${key}_seconds`]))), make("td", {}, String(row.open))));
  $("repairs").replaceChildren(make("table", {}, head, make("tbody", {}, ...rows)));
}
function showSuspensions() {
  const declared = all().filter((row) => row.suspended && !fleet.suspensions.some((s) => s.reason === row.suspended));
  const rows = [...fleet.suspensions, ...declared.map((row) => ({ target: row.issue_key, reason: row.suspended, owner: "", until: null }))];
  $("suspensions").replaceChildren(...(rows.length ? rows.map((row) => make("article", { class: "card held-card" }, make("h3", {}, `${HELD} ${row.target}`), make("p", {}, row.reason),
    make("p", { class: "hint" }, row.owner ? `${t("by", row.owner)}, ` : "", row.until ? withTime("until", row.until) : t("forever")))) : [make("p", { class: "hint" }, t("noSuspensions"))]));
}
function announce(before, after) {
  const known = new Map(Object.values(before.nodes).flatMap((node) => node.resources.map((row) => [row.issue_key, row.status])));
  const changed = Object.values(after.nodes).flatMap((node) => node.resources).filter((row) => known.get(row.issue_key) !== row.status);
  if (changed.length) $("news").textContent = changed.length > 3 ? t("changedMany", changed.length) : changed.map((row) => t("changedNow", row.issue_key, t(row.status))).join(". ");
}
function showAll() {
  if (!fleet) return;
  showVerdict(); showNotices(); showNumbers(); showMatrix(); showDrifts(); showAlerts(); showEpisodes(); showRepairs(); showSuspensions();
}
function translate() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const node of document.querySelectorAll("[data-text]")) node.textContent = t(node.dataset.text);
  $("language").textContent = language === "zh" ? "English" : "中文";
  $("language").lang = language === "zh" ? "en" : "zh-CN";
  $("filter").placeholder = t("filterHint");
  showLegend(); showConnection(); showAll();
  if (opened) show(opened);
}

// --- one resource ----------------------------------------------------------------------------------

async function show(key) {
  const [node, kind, ...rest] = key.split("/"), name = rest.join("/");
  const row = fleet?.nodes[node]?.resources.find((one) => one.issue_key === key);
  if (!row) return;
  opened = key;
  $("detail-title").textContent = key;
  $("detail-body").replaceChildren(...summary({ node, ...row }));
  if (!$("detail").open) { $("detail").showModal(); $("detail-title").focus(); }
  if (location.hash !== `#${encodeURI(key)}`) history.replaceState(null, "", `#${encodeURI(key)}`);
  try {
    const [full, past] = await Promise.all([get(`/api/nodes/${encodeURIComponent(node)}`), get(`/api/events?limit=30&resource=${encodeURIComponent(`${node}/${kind}/${name}`)}`)]);
    const found = full.resources.find((one) => one.issue_key === key);
    if (opened === key && found) $("detail-body").replaceChildren(...summary({ node, ...found }), ...more(found, past.events));
  } catch (error) { if (opened === key) $("detail-body").append(make("p", { class: "error" }, error.message)); }
}
function summary(row) {
  return [
    make("p", {}, make("span", { class: `badge ${row.status.toLowerCase()}` }, `${SYMBOLS[row.status]} ${t(row.status)}`), " ", withTime("since", row.since), " · ", withTime("lastSeen", row.seen)),
    row.suspended ? make("p", {}, make("span", { class: "badge heldbadge" }, `${HELD} ${t("suspendedBecause", row.suspended)}`)) : "",
    row.message ? make("p", {}, make("b", {}, `${t("why")}: `), row.message) : "",
    sides(row.changes) ?? (row.status === "True" ? make("p", { class: "hint" }, t("detailNone")) : ""),
  ].filter(Boolean);
}
function more(row, events) {
  const lines = [row.attempts ? t("failedTries", row.attempts) : "", row.next_attempt ? withTime("nextTry", row.next_attempt) : "", row.quarantined_until ? withTime("quarantine", row.quarantined_until) : ""].filter(Boolean);
  const facts = row.observed && typeof row.observed === "object" ? make("dl", { class: "facts" }, ...Object.entries(row.observed).flatMap(([key, value]) => [make("dt", {}, key), make("dd", {}, short(value))])) : row.observed ? make("p", {}, row.observed) : "";
  const past = events.map((event) => make("li", {}, when(event.timestamp), ` ${WORDS[language].status[event.status] ?? event.status}`, event.details.reason ? ` · ${event.details.reason}` : "",
    event.status === "detected" && event.details.changes?.length ? ` · ${event.details.changes.map((c) => `${c.field}: ${short(c.observed)} → ${short(c.desired)}`).join("; ")}` : ""));
  return [
    row.advice ? make("p", {}, make("b", {}, `${t("advice")}: `), row.advice) : "",
    lines.length ? make("p", {}, ...lines.flatMap((line, index) => (index ? [" · ", line] : [line]))) : "",
    make("p", {}, make("button", { type: "button", on: { click: () => reconcile(row.issue_key) } }, t("lookAgain"))),
    facts ? make("section", {}, make("h3", {}, t("said")), facts) : "",
    make("section", {}, make("h3", {}, t("history")), past.length ? make("ol", { class: "history" }, ...past) : make("p", { class: "hint" }, t("noHistory"))),
  ].filter(Boolean);
}

// --- asking ----------------------------------------------------------------------------------------

const headers = () => (token ? { authorization: `Bearer ${token}` } : {});
async function get(path, options = {}) {
  const answer = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
  const body = await answer.json().catch(() => ({}));
  if (answer.ok) return body;
  const error = new Error(body.error?.message ?? `HTTP ${answer.status}`);
  error.status = answer.status;
  throw error;
}
function needToken(why) {
  return new Promise((resolve) => {
    $("ask-why").textContent = `${why}. ${t("tokenKept")}`;
    $("ask").returnValue = "";
    $("ask").onclose = () => {
      const given = $("token").value.trim();
      $("token").value = "";
      if ($("ask").dataset.use === "yes" && given) { token = given; store.set(sessionStorage, "fleet-token", token); resolve(true); } else resolve(false);
      delete $("ask").dataset.use;
    };
    if (!$("ask").open) $("ask").showModal();
  });
}
async function reconcile(target) {
  try {
    const asked = await get("/api/reconcile", { method: "POST", body: JSON.stringify(target ? { target } : {}), headers: { "content-type": "application/json" } });
    follow(asked.id, "asked");
  } catch (error) {
    if (error.status === 401 && (await needToken(error.message))) { reconcile(target); return; }
    tell(error.message, true);
  }
}
async function follow(id) {
  for (let tries = 0; tries < 600; tries++) {
    const found = await get(`/api/requests/${id}`).catch(() => null);
    if (found?.state === "done") { tell(found.problem || t("askedDone", id, found.exit_code), Boolean(found.problem)); return; }
    if (found) tell(t(found.state === "taken" ? "askedTaken" : "asked", id));
    await pause(1500);
  }
}
function tell(text, wrong) {
  const old = document.querySelectorAll(".told"), where = $("detail").open ? $("detail-body") : $("notices");
  const note = make("p", { class: `told ${wrong ? "error" : "notice"}`, role: "status" }, text);
  if (old.length === 1 && old[0].parentNode === where) { if (old[0].textContent !== text) old[0].replaceWith(note); return; }
  for (const one of old) one.remove();
  where.prepend(note);
}

// --- staying connected -----------------------------------------------------------------------------

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

async function refresh() {
  const found = await get("/api/status"), before = fleet;
  fleet = found; seenAt = new Date();
  if (before) announce(before, found);
  showAll();
  if (!before && location.hash.split("/").length > 2) show(decodeURI(location.hash.slice(1)));
}
async function listen() {
  const quiet = new AbortController();
  const answer = await fetch("/api/stream", { headers: headers(), signal: quiet.signal });
  if (!answer.ok) { const body = await answer.json().catch(() => ({})); const error = new Error(body.error?.message ?? `HTTP ${answer.status}`); error.status = answer.status; throw error; }
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", watch;
  const alive = () => { clearTimeout(watch); watch = setTimeout(() => quiet.abort(), 40000); }; // it speaks every 15 s
  try {
    for (;;) {
      alive();
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines.filter((one) => one.startsWith("data: "))) {
        const news = JSON.parse(line.slice(6));
        if (news.error) throw new Error(news.error);
        if (news.revision !== fleet?.revision) await refresh();
        connection = { state: "live" }; showConnection();
      }
    }
  } finally { clearTimeout(watch); quiet.abort(); }
}
async function stay() {
  for (let failures = 0; ; ) {
    const began = Date.now();
    let why = "";
    try { await listen(); } catch (error) {
      if (error.status === 401) { if (await needToken(error.message)) continue; }
      why = error.status || error instanceof SyntaxError ? error.message : "";
    }
    failures = Date.now() - began > 30000 ? 1 : failures + 1;
    const wait = Math.min(30, 2 ** (failures - 1)) * (0.8 + 0.4 * Math.random());
    connection = { state: "lost", until: Date.now() + wait * 1000, why }; showConnection();
    await pause(wait * 1000);
  }
}
function showConnection() {
  const node = $("live");
  node.className = `live ${{ live: "", lost: "lost", connecting: "waiting" }[connection.state]}`;
  if (connection.state !== "lost") { node.textContent = t(connection.state); return; }
  const seconds = Math.max(0, Math.ceil((connection.until - Date.now()) / 1000));
  node.textContent = [t("lost", seenAt ? new Intl.DateTimeFormat(locale(), { timeStyle: "medium" }).format(seenAt) : "–"), connection.why, t("retry", seconds)].filter(Boolean).join(" · ");
}

$("matrix").addEventListener("keydown", onKey);
$("matrix").addEventListener("click", (event) => {
  const cell = event.target.closest("td");
  if (!cell) return;
  grid.forEach((line, y) => { const x = line.indexOf(cell); if (x >= 0) move(y, x); });
  show(cell.dataset.key);
});
$("filter").addEventListener("input", () => fleet && showMatrix());
$("problems").addEventListener("change", () => fleet && showMatrix());
$("reconcile").addEventListener("click", () => reconcile(""));
$("language").addEventListener("click", () => { language = language === "zh" ? "en" : "zh"; store.set(localStorage, "fleet-language", language); translate(); });
$("close").addEventListener("click", () => $("detail").close());
$("detail").addEventListener("close", () => { opened = null; history.replaceState(null, "", location.pathname); });
$("detail").addEventListener("click", (event) => { if (event.target === $("detail")) $("detail").close(); });
$("ask-form").addEventListener("submit", () => { $("ask").dataset.use = "yes"; });
$("ask-cancel").addEventListener("click", () => $("ask").close());
setInterval(tick, 1000);
translate();
stay();
