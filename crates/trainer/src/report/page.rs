//! What every page of this program has: head, style, script. One file, nothing is loaded from
//! elsewhere.

use std::fmt::Write;

/// The style sheet.
const STYLE: &str = include_str!("../report.css");

/// The script of the charts. Without it the page is complete too.
const SCRIPT: &str = include_str!("script.js");

/// Seconds after which a page of a run that goes on loads a newer one.
pub(super) const REFRESH: u32 = 30;

/// A whole page. `body` is HTML. `refreshes`: whether a newer one is loaded now and then.
pub(super) fn page(title: &str, refreshes: bool, body: &str) -> String {
    let title = escape(title);
    // With a script the page keeps its place, and is left alone while somebody looks at a part.
    let (mark, tag) = match refreshes {
        true => (
            format!(" data-refresh=\"{REFRESH}\""),
            format!("<noscript><meta http-equiv=\"refresh\" content=\"{REFRESH}\"></noscript>"),
        ),
        false => (String::new(), String::new()),
    };
    let mut page = format!(
        "<!doctype html><html lang=\"en\"{mark}><head><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width\">{tag}<title>{title} – finetune</title><style>{STYLE}</style></head><body><main>"
    );
    let _ = writeln!(page, "<h1>{title}</h1>{body}</main><script>{SCRIPT}</script></body></html>");
    page
}

/// A list of names and values. Names are HTML, values are text; empty ones are left out.
pub(super) fn facts(page: &mut String, facts: Vec<(&str, String)>) {
    page.push_str("<dl>");
    for (name, value) in facts.into_iter().filter(|(_, value)| !value.is_empty()) {
        let _ = write!(page, "<div><dt>{name}</dt><dd>{}</dd></div>", escape(&value));
    }
    page.push_str("</dl>");
}

/// Text as HTML.
pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_users_cannot_become_markup() {
        assert_eq!(escape("<script>\"&"), "&lt;script&gt;&quot;&amp;");
        let page = page("</title><script>alert(1)</script>", true, "");
        assert_eq!(page.matches("<script>").count(), 1, "{page}");
        assert!(!SCRIPT.contains("</") && !STYLE.contains("</"), "they would end their own element");
    }

    #[test]
    fn nothing_is_loaded_from_elsewhere() {
        let page = page("a run", true, "");
        for part in ["src=", "href=", "@import", "url(", "fetch(", "https:"] {
            assert!(!page.contains(part), "has {part}");
        }
    }
}
