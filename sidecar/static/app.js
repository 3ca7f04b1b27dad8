"use strict";
const texts = {
  en: { skip: "Skip to content", logout: "Log out", token: "Admin token", login: "Log in", where: "The sidecar prints at its start where the token is.",
    numbers: "Numbers", requests: "Requests", errors: "Errors", tokens: "Tokens", cost: "Cost (US$)", queue: "Waiting", emergency: "Emergency starts",
    pools: "Pools", backend: "Backend", pool: "Pool", status: "Status", starts: "Starts / minute", flight: "In flight", detail: "Detail",
    none: "No backend yet. Add one with POST /api/admin/backends or a backends file.", time: "Last 24 hours", tokensTime: "Tokens per hour",
    costTime: "Cost per hour (US$)", live: "live", lost: "connection lost, trying again", wrong: "This token is not right.",
    healthy: "healthy", cooling: "cooling", error: "error", disabled: "disabled", primary: "primary", fallback: "fallback", seconds: "s", noData: "nothing yet" },
  zh: { skip: "跳到内容", logout: "退出", token: "管理员令牌", login: "登录", where: "sidecar 启动时会显示令牌所在位置。",
    numbers: "概览", requests: "请求", errors: "错误", tokens: "令牌数", cost: "费用（美元）", queue: "排队", emergency: "应急通道请求",
    pools: "资源池", backend: "后端", pool: "池", status: "状态", starts: "每分钟请求", flight: "进行中", detail: "详情",
    none: "还没有后端。请用 POST /api/admin/backends 或后端文件添加。", time: "最近 24 小时", tokensTime: "每小时令牌数",
    costTime: "每小时费用（美元）", live: "实时", lost: "连接中断，正在重试", wrong: "令牌不正确。",
    healthy: "正常", cooling: "冷却中", error: "错误", disabled: "已停用", primary: "主池", fallback: "备用池", seconds: "秒", noData: "暂无数据" },
};
const $ = (id) => document.getElementById(id);
let language = localStorage.getItem("language") || (navigator.language.startsWith("zh") ? "zh" : "en");
let last = null, source = null, connected = null;
const t = (key) => texts[language][key] || key;

function translate() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const node of document.querySelectorAll("[data-text]")) node.textContent = t(node.dataset.text);
  $("language").textContent = language === "zh" ? "English" : "中文";
  showLive(); if (last) show(last);
}
function showLive() {
  $("live").textContent = connected === null ? "" : t(connected ? "live" : "lost");
  $("live").className = connected === false ? "off" : "";
}
function number(value, digits = 0) {
  return new Intl.NumberFormat(document.documentElement.lang, { maximumFractionDigits: digits }).format(value);
}
function cell(row, text, kind) {
  const td = row.insertCell(); td.textContent = text; if (kind) td.className = kind;
}
function show(data) {
  last = data;
  $("n-requests").textContent = number(data.total.total_requests);
  $("n-errors").textContent = number(data.total.total_errors);
  $("n-tokens").textContent = number(data.total.total_tokens);
  $("n-cost").textContent = number(data.total.total_cost, 4);
  $("n-queue").textContent = number(data.queue);
  $("n-emergency").textContent = number(data.emergency);
  const reasons = Object.values(data.reasons);
  $("reasons").hidden = !reasons.length || !data.backends.length; $("reasons").textContent = reasons.join(" · ");
  $("none").hidden = data.backends.length > 0;
  const body = document.createElement("tbody"); body.id = "backends";
  for (const b of data.backends) {
    const row = body.insertRow();
    cell(row, b.label || b.name || b.id); cell(row, t(b.pool));
    const rest = b.cooldown_seconds > 0 ? ` ${Math.ceil(b.cooldown_seconds)} ${t("seconds")}` : "";
    cell(row, t(b.status) + rest, b.status);
    cell(row, `${number(b.starts_last_minute)} / ${number(b.rpm_limit)}`); cell(row, number(b.in_flight));
    cell(row, b.status_detail, "detail");
  }
  $("backends").replaceWith(body);
  chart("c-tokens", data, "tokens", 0); chart("c-cost", data, "cost", 4);
}
function chart(id, data, field, digits) {
  const svg = $(id), hour = 3600, end = Math.floor(data.now / hour) * hour;
  const values = new Map(data.series.map((row) => [row.hour_bucket, row[field]]));
  const most = Math.max(0, ...values.values());
  svg.replaceChildren(); svg.setAttribute("aria-label", most ? `max ${number(most, digits)}` : t("noData"));
  const add = (name, attributes, text) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text) node.textContent = text; svg.append(node);
  };
  add("text", { x: 2, y: 9 }, most ? number(most, digits) : t("noData"));
  for (let i = 0; i < 24; i++) {
    const value = values.get(end - (23 - i) * hour) || 0;
    if (value) { const h = Math.max(1, 64 * value / most); add("rect", { x: i * 10 + 1, y: 78 - h, width: 8, height: h }); }
  }
}
function connect() {
  if (source) source.close();
  source = new EventSource("/dashboard/sse");
  source.onmessage = (event) => {
    connected = true; showLive();
    $("login").hidden = true; $("overview").hidden = false; $("logout").hidden = false;
    show(JSON.parse(event.data));
  };
  source.onerror = async () => {
    if (source.readyState !== EventSource.CLOSED) { connected = false; showLive(); return; }
    // Closed for good means an answer other than 200: without a session, ask for the token.
    if (connected) { connected = false; showLive(); setTimeout(connect, 2000); return; }
    $("overview").hidden = true; $("logout").hidden = true; $("login").hidden = false; $("token").focus();
    connected = null; showLive();
  };
}
$("login").addEventListener("submit", async (event) => {
  event.preventDefault(); $("login-error").textContent = "";
  const answer = await fetch("/dashboard/login", { method: "POST", body: $("token").value, headers: { "content-type": "text/plain" } });
  if (answer.ok) { $("token").value = ""; connect(); $("main").focus(); } else $("login-error").textContent = t("wrong");
});
$("language").addEventListener("click", () => {
  language = language === "zh" ? "en" : "zh"; localStorage.setItem("language", language); translate();
});
translate(); connect();
