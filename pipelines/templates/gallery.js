
(function () {
  var status = "all", look = document.getElementById("look"), words = document.getElementById("words");
  var entries = Array.prototype.slice.call(document.querySelectorAll("[data-name]"));
  var filters = Array.prototype.slice.call(document.querySelectorAll("[data-status]"));
  var failures = document.getElementById("failures"), view = document.getElementById("view");
  function show() {
    var wanted = words.value.toLowerCase(), num = 0, numFailed = 0;
    entries.forEach(function (entry) {
      var isFailed = entry.tagName === "TR";
      var fits = (status === "all" || (status === "failed") === isFailed)
        && (!look.value || entry.dataset.look === look.value)
        && entry.dataset.name.toLowerCase().indexOf(wanted) >= 0;
      entry.hidden = !fits;
      if (fits) { num += 1; if (isFailed) { numFailed += 1; } }
    });
    failures.hidden = numFailed === 0;
    if (status === "failed") { failures.open = true; }
    document.getElementById("none").hidden = num > 0;
  }
  filters.forEach(function (button) {
    button.addEventListener("click", function () {
      status = button.dataset.status;
      filters.forEach(function (one) { one.setAttribute("aria-pressed", String(one === button)); });
      show();
    });
  });
  look.addEventListener("change", show);
  words.addEventListener("input", show);
  view.addEventListener("click", function () {
    var isOn = document.body.classList.toggle("columns");
    view.setAttribute("aria-pressed", String(isOn));
  });
  document.getElementById("pictures").addEventListener("input", function (event) {
    event.target.parentNode.style.setProperty("--cut", event.target.value + "%");
  });
}());
