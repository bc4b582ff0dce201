"use strict";
(() => {
  const PAGE = 200;
  const NONE = "(none)";
  const SYMBOLS = { CONFORMS: "✓", UNSUPPORTED: "–" };
  const STATES = { CONFORMS: "passed", UNSUPPORTED: "unsupported" };
  const FILTERS = ["q", "verdict", "suite", "dtype", "phase", "feature", "model", "layer", "subject"];

  const data = JSON.parse(document.getElementById("data").textContent);
  const text = (place) => data.strings[place];
  const cases = data.rows.map((row, order) => {
    const item = { order };
    data.columns.forEach((name, column) => {
      const value = row[column];
      if (name === "blocks") item.blocks = value;
      else if (name === "ratio") item.ratio = value === "inf" ? Infinity : value;
      else item[name] = Array.isArray(value) ? value.map(text) : text(value);
    });
    item.failed = !(item.verdict in STATES);
    item.words = [item.key, item.verdict, item.suite, item.dtype, item.phase, item.model, item.layer, item.subject, item.reason, ...item.features].join(" ").toLowerCase();
    return item;
  });
  const byKey = new Map(cases.map((item) => [item.key, item]));
  const drawn = new Map([...document.querySelectorAll("details.case")].map((node) => [node.dataset.key, node]));

  const form = document.getElementById("filters");
  const table = document.getElementById("table");
  const body = table.tBodies[0];
  const more = document.getElementById("more");
  const open = new Set();
  let state = new URLSearchParams();
  let matching = [];
  let limit = PAGE;

  function make(tag, properties, ...children) {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
  }

  // The same elements as section.html.j2.
  function draw([kind, title, ...rest]) {
    const section = make("section", { className: kind }, make("h4", {}, text(title)));
    if (kind === "facts") {
      const pairs = rest[0].map(([name, value]) =>
        make("div", {}, make("dt", {}, text(name)), make("dd", {}, text(value))));
      section.append(make("dl", {}, ...(pairs.length ? pairs : [make("div", {}, make("dd", {}, "none"))])));
    } else if (kind === "grid") {
      const [header, rows, marked] = rest;
      const head = make("tr", {}, ...header.map((name) => make("th", { scope: "col" }, text(name))));
      const lines = rows.map((row, place) =>
        make("tr", { className: marked.includes(place) ? "over" : "" }, ...row.map((cell) => make("td", {}, text(cell)))));
      section.append(make("div", { className: "scroll" },
        make("table", {}, make("thead", {}, head), make("tbody", {}, ...lines))));
    } else {
      section.append(make("button", { type: "button", className: "copy" }, "Copy"), make("pre", {}, text(rest[0])));
    }
    return section;
  }

  function address(item) {
    return "#case=" + encodeURIComponent(item.key);
  }

  function section(item) {
    const parts = item.blocks
      ? [make("p", { className: "permalink" }, make("a", { href: address(item) }, "Permalink")), ...item.blocks.map(draw)]
      : [...drawn.get(item.key).querySelector(".body").cloneNode(true).childNodes];
    const reason = item.reason ? [make("p", { className: "reason" }, item.reason)] : [];
    return make("div", { className: "body" }, ...reason, ...parts);
  }

  // Words must all occur; -word must not; ratio<x, ratio<=x, ratio>x and ratio>=x compare.
  function query(source) {
    const compare = { "<": (a, b) => a < b, "<=": (a, b) => a <= b, ">": (a, b) => a > b, ">=": (a, b) => a >= b };
    const tests = source.toLowerCase().split(/\s+/).filter(Boolean).map((token) => {
      const match = /^ratio(<=|>=|<|>)(\d*\.?\d+)$/.exec(token);
      if (match) return (item) => item.ratio !== null && compare[match[1]](item.ratio, Number(match[2]));
      if (token.length > 1 && token[0] === "-") return (item) => !item.words.includes(token.slice(1));
      return (item) => item.words.includes(token);
    });
    return (item) => tests.every((test) => test(item));
  }

  function admits(name, wanted, item) {
    if (name === "suite") return item.suite === wanted || wanted.split(" ").includes(item.suite);
    if (name === "feature") return wanted === NONE ? !item.features.length : item.features.includes(wanted);
    return item[name] === (wanted === NONE ? "" : wanted);
  }

  function sortKey(item, name) {
    if (name === "ratio") return item.ratio ?? (item.failed ? Infinity : -1);
    return name === "features" ? item.features.join(", ") : name === "model" ? item.model + " " + item.layer : item[name];
  }

  function row(item) {
    const state = STATES[item.verdict] || "failed";
    const symbol = make("span", { ariaHidden: "true" }, SYMBOLS[item.verdict] || "✗");
    const toggle = make("button", { type: "button", className: "open", ariaExpanded: String(open.has(item.key)), ariaLabel: "Details of " + item.key }, "▸");
    const cells = [
      toggle,
      make("span", { className: "verdict " + state }, symbol, " " + item.verdict),
      make("a", { href: address(item) }, make("code", {}, item.key)),
      item.features.join(", "),
      [item.model, item.layer].filter(Boolean).join(" · "),
      item.phase, item.dtype, item.ratioText,
    ];
    const line = make("tr", { className: "row" }, ...cells.map((cell) => make("td", {}, cell)));
    line.dataset.key = item.key;
    return line;
  }

  function detail(item) {
    const cell = make("td", { colSpan: 8 }, section(item));
    return make("tr", { className: "detail" }, cell);
  }

  function render() {
    const wanted = FILTERS.filter((name) => name !== "q" && state.get(name)).map((name) => [name, state.get(name)]);
    const test = query(state.get("q") || "");
    matching = cases.filter((item) => wanted.every(([name, value]) => admits(name, value, item)) && test(item));
    const sort = state.get("sort") || "-ratio";
    const name = sort.replace("-", "");
    const sign = sort[0] === "-" ? -1 : 1;
    const keyed = matching.map((item) => [sortKey(item, name), item]);
    keyed.sort(([a, x], [b, y]) => (a < b ? -sign : a > b ? sign : x.order - y.order));
    matching = keyed.map(([, item]) => item);
    for (const button of table.querySelectorAll("[data-sort]")) {
      const chosen = button.dataset.sort === name;
      button.parentNode.ariaSort = chosen ? (sign < 0 ? "descending" : "ascending") : null;
    }
    const lines = [];
    for (const item of matching.slice(0, limit)) {
      lines.push(row(item));
      if (open.has(item.key)) lines.push(detail(item));
    }
    body.replaceChildren(...lines);
    more.hidden = matching.length <= limit;
    const count = matching.length.toLocaleString("en") + " of " + cases.length.toLocaleString("en") + " cases";
    document.getElementById("shown").value = count + (more.hidden ? "" : ", first " + limit.toLocaleString("en") + " shown");
  }

  function showFilters() {
    for (const control of form.elements) {
      if (!control.name) continue;
      const value = state.get(control.name) || "";
      if (control.tagName === "SELECT" && ![...control.options].some((option) => option.value === value)) {
        control.append(make("option", { value }, value));
      }
      control.value = value;
    }
  }

  function save() {
    const pairs = [...state].map(([name, value]) => name + "=" + encodeURIComponent(value));
    history.replaceState(null, "", "#" + pairs.join("&"));
  }

  function toggle(item, line) {
    const button = line.querySelector(".open");
    if (open.delete(item.key)) {
      line.nextSibling.remove();
      if (state.get("case") === item.key) state.delete("case");
    } else {
      open.add(item.key);
      line.after(detail(item));
      state.set("case", item.key);
    }
    button.ariaExpanded = String(open.has(item.key));
    save();
  }

  function fill(node) {
    const item = byKey.get(node.dataset.key);
    if (!item || !item.blocks || !node.querySelector(".lazy")) return;
    node.querySelector(".body").replaceChildren(...section({ ...item, reason: "" }).childNodes);
  }

  // Brings the case that the address names into view: among the failures, or else in the table.
  function reveal(key) {
    const item = byKey.get(key);
    if (!item) return;
    const node = drawn.get(key);
    if (node) {
      fill(node);
      node.open = true;
      node.scrollIntoView();
      return;
    }
    if (!matching.includes(item)) {
      FILTERS.forEach((name) => state.delete(name));
      showFilters();
      render();
    }
    open.add(key);
    limit = Math.max(limit, matching.indexOf(item) + 1);
    render();
    [...body.rows].find((line) => line.dataset.key === key).scrollIntoView();
  }

  function follow() {
    const source = location.hash.slice(1);
    if (source && !source.includes("=")) return;
    state = new URLSearchParams(source.replaceAll("+", "%2B"));
    limit = PAGE;
    showFilters();
    render();
    if (state.get("case")) reveal(state.get("case"));
    else if (FILTERS.some((name) => state.get(name))) document.getElementById("cases").scrollIntoView();
  }

  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", (event) => {
    if (event.target.value) state.set(event.target.name, event.target.value);
    else state.delete(event.target.name);
    state.delete("case");
    limit = PAGE;
    save();
    render();
  });
  form.addEventListener("reset", (event) => {
    event.preventDefault();
    state = new URLSearchParams();
    open.clear();
    limit = PAGE;
    save();
    showFilters();
    render();
  });
  table.tHead.addEventListener("click", (event) => {
    const button = event.target.closest("[data-sort]");
    if (!button) return;
    const name = button.dataset.sort;
    const current = state.get("sort") || "-ratio";
    const first = name === "ratio" ? "-ratio" : name;
    const other = name === "ratio" ? "ratio" : "-" + name;
    state.set("sort", current === first ? other : first);
    save();
    render();
  });
  body.addEventListener("click", (event) => {
    const line = event.target.closest("tr.row");
    if (!line || event.ctrlKey || event.metaKey || event.shiftKey || getSelection().toString()) return;
    event.preventDefault();
    toggle(byKey.get(line.dataset.key), line);
  });
  more.addEventListener("click", (event) => {
    if (event.target.value) limit = event.target.value === "all" ? Infinity : limit + PAGE;
    render();
  });
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button.copy");
    if (button) {
      const source = button.parentNode.querySelector("pre");
      const done = () => { button.textContent = "Copied"; setTimeout(() => { button.textContent = "Copy"; }, 1500); };
      const select = () => getSelection().selectAllChildren(source);
      navigator.clipboard ? navigator.clipboard.writeText(source.textContent).then(done, select) : select();
    }
    const link = event.target.closest("a[href^='#']");
    if (link && !event.defaultPrevented && link.hash === location.hash) follow();
  });
  document.addEventListener("toggle", (event) => {
    if (event.target.matches("details.case") && event.target.open) fill(event.target);
  }, true);
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.ctrlKey || event.metaKey || event.target.matches("input, select, textarea")) return;
    event.preventDefault();
    form.elements.q.focus();
  });
  addEventListener("beforeprint", () => drawn.forEach((node) => { fill(node); node.open = true; }));
  addEventListener("hashchange", follow);

  document.documentElement.classList.add("js");
  form.hidden = table.hidden = false;
  render();
  follow();
})();
