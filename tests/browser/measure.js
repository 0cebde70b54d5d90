// Runs in a page with the report in frames of several widths; writes its findings as JSON to #found.
function rects(node) {
  const range = document.createRange();
  range.selectNodeContents(node);
  return [...range.getClientRects()].filter((rect) => rect.width > 0 && rect.height > 0);
}

function texts(document) {
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  while (walker.nextNode()) if (walker.currentNode.data.trim()) found.push(walker.currentNode);
  return found;
}

function outside(inner, outer) {
  const slack = 1.5; // a pixel of rounding on either side
  return inner.right > outer.right + slack || inner.left < outer.left - slack;
}

// Text must stay within the page; in a scrolling table, within its cell; in an SVG, within the image.
function overflowing(frame) {
  const page = { left: 0, right: frame.clientWidth };
  return texts(frame.contentDocument).filter((text) => {
    const scrolls = text.parentElement.closest(".scroll");
    const box = scrolls ? text.parentElement.closest("th, td") : text.parentElement.closest("svg");
    return rects(text).some((rect) => outside(rect, box ? box.getBoundingClientRect() : page));
  }).map((text) => text.data.trim().slice(0, 60));
}

// Labels of a plot may touch; they must not overlap by more than a quarter of a line.
function colliding(frame) {
  const found = [];
  for (const svg of frame.contentDocument.querySelectorAll("svg")) {
    const labels = [...svg.querySelectorAll("text")].map((text) => [text.textContent, text.getBoundingClientRect()]);
    labels.forEach(([name, one], place) => labels.slice(place + 1).forEach(([other, two]) => {
      const across = Math.min(one.right, two.right) - Math.max(one.left, two.left);
      const down = Math.min(one.bottom, two.bottom) - Math.max(one.top, two.top);
      if (across > 2 && down > 0.25 * Math.min(one.height, two.height)) found.push(`${name} / ${other}`);
    }));
  }
  return found;
}

// The table of the models: what a reader sees of it without scrolling.
function models(frame) {
  const table = frame.contentDocument.querySelector("#models .scroll");
  if (!table) return {};
  const shown = [...table.querySelectorAll("thead th")].filter((cell) => rects(cell).length);
  return {
    columns: shown.map((cell) => cell.innerText.trim()),
    hidden_pixels: table.scrollWidth - table.clientWidth,
    top: table.getBoundingClientRect().top,
    first_rows: [...table.querySelectorAll("tbody tr")].slice(0, 3).map((row) => row.getBoundingClientRect().bottom),
  };
}

addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map((frame) => {
    frame.contentDocument.querySelectorAll("details").forEach((details) => { details.open = true; });
    return {
      width: frame.clientWidth,
      page_width: frame.contentDocument.documentElement.scrollWidth,
      models: models(frame),
      texts: texts(frame.contentDocument).length,
      overflowing: overflowing(frame),
      colliding: colliding(frame),
      requested: frame.contentWindow.performance.getEntriesByType("resource").map((entry) => entry.name),
    };
  });
  document.getElementById("found").textContent = JSON.stringify(found);
});
