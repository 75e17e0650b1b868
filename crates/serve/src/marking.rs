//! How the chat template of a model marks what answers consist of: reasoning, text, calls of tools.

use finetune_dataset::{ChatTokenizer, REASONING_TAGS, opened_by};

use crate::call_form::Begins;
use crate::call_formats::{CallFormat, formats};
use crate::harmony::{self, HarmonyReader};
use crate::parts::{PartReader, TaggedReader};
use crate::tool_calls::{CallReader, Tools};

/// What a template marks, and how.
pub(crate) struct Marking {
    /// Messages with channels, as gpt-oss has them. The rest does not matter then.
    is_harmony: bool,
    formats: Vec<&'static CallFormat>,
    /// Tags of reasoning that the template has.
    tags: Vec<&'static str>,
}

impl Marking {
    pub(crate) fn of(tokenizer: &ChatTokenizer) -> Marking {
        Marking::in_template(|text| tokenizer.template_has(text))
    }

    fn in_template(has: impl Fn(&str) -> bool) -> Marking {
        let is_tag = |(open, _): &&(&str, &str)| has(open);
        let tags = REASONING_TAGS.iter().filter(is_tag).flat_map(|(open, close)| [*open, *close]).collect();
        let formats = formats(|sign| sign.is_empty() || has(sign));
        Marking { is_harmony: harmony::is_written(&has), formats, tags }
    }

    pub(crate) fn is_harmony(&self) -> bool {
        self.is_harmony
    }

    /// How calls may be written.
    pub(crate) fn formats(&self) -> &[&'static CallFormat] {
        &self.formats
    }

    /// What the template has put in front of the answer that the reader has to know.
    pub(crate) fn opened_by<'a>(&self, prompt: &'a str) -> Option<&'a str> {
        if self.is_harmony { harmony::opened_by(prompt) } else { opened_by(prompt) }
    }

    /// The special tokens whose text belongs to answers: readers look for them.
    pub(crate) fn shown(&self, with_tools: bool) -> Vec<&'static str> {
        if self.is_harmony {
            return harmony::MARKS.to_vec();
        }
        let marks = self.formats.iter().filter(|_| with_tools).flat_map(|format| format.marks).copied();
        // A tag may be a token and a word (`<|channel>thought`).
        let tags = self.tags.iter().map(|tag| tag.find('>').map_or(*tag, |end| &tag[..=end]));
        tags.chain(marks).collect()
    }

    /// What takes an answer apart. `opened`: as [`Marking::opened_by`] says. Without tools calls are text. `only`: what
    /// begins calls, if they have a form.
    pub(crate) fn reader(&self, opened: Option<&str>, tools: Option<&Tools>, only: Option<Begins>) -> PartReader {
        let tools = tools.cloned();
        if self.is_harmony {
            return PartReader::Harmony(HarmonyReader::new(opened, tools));
        }
        let calls = tools.map(|tools| {
            let reader = CallReader::new(self.formats.clone(), tools);
            only.into_iter().fold(reader, CallReader::of_form)
        });
        PartReader::Tagged(TaggedReader::new(opened, calls))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// (a piece of a published template, an answer, reasoning, text, the name of the tool that is called)
    #[test]
    fn answers_as_the_templates_of_families_mark_them() {
        for (template, answer, reasoning, text, name) in [
            (
                "{{- \"<|start|>assistant<|channel|>final<|message|>\" + message.content + \"<|end|>\" }}",
                "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary to=functions.now \
                 <|constrain|>json<|message|>{}<|call|>",
                "hm",
                "",
                "now",
            ),
            (
                "{{- '<tool_call>\\n<function=' + tool_call.name + '>\\n' }} {{- '<think>\\n' }}",
                "<think>\nhm\n</think>\n\nSo:\n\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
                "hm",
                "So:\n\n",
                "now",
            ),
            (
                "{{'<｜Assistant｜><think>\\n'}} {{'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>'}}",
                "<think>\nhm\n</think>\n\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```\
                 <｜tool▁call▁end｜><｜tool▁calls▁end｜>",
                "hm",
                "",
                "now",
            ),
            (
                "<|tool_calls_section_begin|> <think>{{rc}}</think>",
                "<think>hm</think>So:<|tool_calls_section_begin|><|tool_call_begin|>functions.now:0\
                 <|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
                "hm",
                "So:",
                "now",
            ),
            (
                "{{ '\\n<think>' }} <tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>",
                "\n<think>hm</think>\n<tool_call>now\n</tool_call>",
                "hm",
                "",
                "now",
            ),
            (
                "{{- '<|channel>thought\\n' }} {{- '<|tool_call>call:' + function['name'] + '{' -}}",
                "<|channel>thought\nhm\n<channel|>So:<|tool_call>call:now{}<tool_call|>",
                "hm",
                "So:",
                "now",
            ),
        ] {
            let marking = Marking::in_template(|text| template.contains(text));
            let tools = Tools::new(json!([{"type": "function", "function": {"name": "now"}}]));
            let mut reader = marking.reader(None, Some(&tools), None);
            let mut parts = reader.push(answer);
            let last = reader.finish();
            parts.reasoning += &last.reasoning;
            parts.text += &last.text;
            parts.calls.extend(last.calls);
            let names: Vec<&str> = parts.calls.iter().map(|call| call.name.as_str()).collect();
            assert_eq!(
                (parts.reasoning.as_str(), parts.text.as_str(), names),
                (reasoning, text, vec![name]),
                "{answer}"
            );
        }
    }

    /// What tells published templates apart. (a file, is it gpt-oss's, a mark that it has beside those of all)
    #[test]
    fn published_templates() {
        let Some(templates) = std::env::var_os("CHAT_TEMPLATES") else {
            eprintln!("SKIPPED: published_templates needs a directory of templates (CHAT_TEMPLATES)");
            return;
        };
        for (file, is_harmony, mark) in [
            ("gptoss.jinja", true, "<|channel|>"),
            ("deepseekv3.jinja", false, "<｜tool▁sep｜>"),
            ("glm4moe.jinja", false, "<arg_key>"),
            ("qwen3.jinja", false, "<think>"),
            ("gemma3.jinja", false, ""),
            ("llama3_1.jinja", false, ""),
        ] {
            let path = std::path::Path::new(&templates).join(file);
            let template = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            let marking = Marking::in_template(|text| template.contains(text));
            assert_eq!(marking.is_harmony(), is_harmony, "{file}");
            let of_all = Marking::in_template(str::is_empty).shown(true);
            let own: Vec<&str> = marking.shown(true).into_iter().filter(|shown| !of_all.contains(shown)).collect();
            assert!(if mark.is_empty() { own.is_empty() } else { own.contains(&mark) }, "{file}: {own:?}");
        }
    }

    #[test]
    fn special_tokens_that_are_shown() {
        let shown = |template: &str, with_tools| Marking::in_template(|text| template.contains(text)).shown(with_tools);
        assert_eq!(shown("", false), Vec::<&str>::new());
        assert!(shown("", true).contains(&"[TOOL_CALLS]"));
        assert_eq!(shown("[THINK]", false), ["[THINK]", "[/THINK]"]);
        let gemma = shown("<|channel>thought <|tool_call>call:", true);
        assert!(["<|channel>", "<channel|>", "<|tool_call>", "<|\"|>"].iter().all(|mark| gemma.contains(mark)));
        assert_eq!(shown("<|start|><|channel|>final<|message|>", false), harmony::MARKS);
    }
}
