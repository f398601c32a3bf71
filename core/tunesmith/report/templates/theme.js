// Axes, legends and labels take the page's own text colour, and follow it when the theme changes.
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  function paint() {
    const soft = getComputedStyle(document.documentElement).getPropertyValue("--soft").trim();
    for (const shown of Bokeh.documents) {
      for (const model of shown._all_models.values()) {
        for (const name of ["major_label_text_color", "axis_label_text_color", "label_text_color", "grid_line_color"]) {
          if (name in model && model[name] !== null) model[name] = soft;
        }
        if (model.type === "Whisker") model.line_color = soft;
        if (model.name === "muted") model.text_color = soft;
      }
    }
  }
  dark.addEventListener("change", paint);
  const wait = setInterval(() => {
    if (window.Bokeh && Bokeh.documents.length) { clearInterval(wait); paint(); }
  }, 30);
})();
