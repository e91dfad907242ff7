// Light, dark, or as the system says; the choice is kept on this machine.

const THEMES = ["system", "light", "dark"];

export function startTheme() {
  const button = document.querySelector("[data-theme-switch]");
  let theme = "system";
  try {
    theme = localStorage.getItem("theme") ?? theme;
  } catch {
    // A browser that keeps nothing shows the system's.
  }
  const apply = () => {
    if (!THEMES.includes(theme)) theme = "system";
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    button.querySelector("span").textContent = theme;
  };
  button.hidden = false;
  button.addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    try {
      localStorage.setItem("theme", theme);
    } catch {
      // Then it holds for this page.
    }
    apply();
  });
  apply();
}
