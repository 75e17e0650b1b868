//! OmegaConf's interpolation: `${output_dir}/logs` becomes the text that it stands for. torchtune and
//! LLaMA-Factory read their files with OmegaConf.

use crate::yaml::{Node, Value};

/// A reference that leads to a reference, and so on, at most.
const LONGEST_CHAIN: usize = 16;
/// A text that grows by its references is left as it is beyond this, in bytes.
const LONGEST_TEXT: usize = 4096;

/// Replaces every `${key.path}` by what it names. What cannot be resolved, such as `${oc.env:HOME}`,
/// stays as it is.
pub(crate) fn resolve(root: &mut Node) {
    let whole = root.clone();
    replace(root, &whole);
}

fn replace(node: &mut Node, whole: &Node) {
    match &mut node.value {
        Value::List(items) => items.iter_mut().for_each(|item| replace(item, whole)),
        Value::Map(entries) => entries.iter_mut().for_each(|entry| replace(&mut entry.node, whole)),
        Value::Scalar { text, plain } if text.contains("${") => {
            let mut current = (text.clone(), *plain);
            for _ in 0..LONGEST_CHAIN {
                match once(&current.0, whole) {
                    Some(next) if next.0.len() <= LONGEST_TEXT => current = next,
                    _ => break,
                }
            }
            (*text, *plain) = current;
        }
        Value::Scalar { .. } => {}
    }
}

/// The text with its first reference replaced. If the reference is the whole text, the value keeps
/// its kind: `${batch_size}` is a number.
fn once(text: &str, whole: &Node) -> Option<(String, bool)> {
    let mut from = 0;
    while let Some(start) = text[from..].find("${").map(|at| from + at) {
        let end = start + text[start..].find('}')?;
        let found = lookup(&text[start + 2..end], whole);
        if let Some(Value::Scalar { text: value, plain }) = found.map(|node| &node.value) {
            if start == 0 && end + 1 == text.len() {
                return Some((value.clone(), *plain));
            }
            return Some((format!("{}{value}{}", &text[..start], &text[end + 1..]), true));
        }
        from = end;
    }
    None
}

fn lookup<'a>(path: &str, whole: &'a Node) -> Option<&'a Node> {
    let mut node = whole;
    for name in path.trim().split('.') {
        node = &node.entry(name)?.node;
    }
    Some(node)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    #[test]
    fn references_are_followed_and_loops_end() {
        let text = "a: /tmp/${name}\nname: x\nb: ${a}/logs\nc: ${n.m}\nn:\n  m: 4\nd: ${oc.env:HOME}/z\ne: ${e}1\n";
        let mut root = crate::yaml::parse(text, Path::new("x.yaml")).expect("YAML");
        super::resolve(&mut root);
        let text = |key: &str| root.entry(key).and_then(|entry| entry.node.text()).map(str::to_owned);
        assert_eq!(text("a").as_deref(), Some("/tmp/x"));
        assert_eq!(text("b").as_deref(), Some("/tmp/x/logs"));
        assert_eq!(root.entry("c").and_then(|entry| entry.node.integer()), Some(4));
        assert_eq!(text("d").as_deref(), Some("${oc.env:HOME}/z"));
        assert!(text("e").is_some_and(|text| text.contains("${e}")));
    }
}
