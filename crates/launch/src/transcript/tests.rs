//! Answers are taken apart, and bounded.

use super::*;

#[test]
fn sections_between_marks() {
    let answer = "Welcome!\nX begin fake\n\n8f3 begin name\nmini-1\n\n8f3 end name 0\n\n8f3 begin rdma\nsh: rdma_ctl: not found\n\n\
                  8f3 end rdma 127\n8f3 begin name\nagain\n\n8f3 end name 0\n8f3 begin cut\nhalf a li";
    let transcript = Transcript::parse(answer.as_bytes(), "8f3");
    assert_eq!(transcript.section("name").unwrap(), &Section { text: "mini-1\n".into(), status: Some(0) });
    assert_eq!(transcript.section("rdma").unwrap().status, Some(127));
    assert_eq!(transcript.section("cut").unwrap(), &Section { text: "half a li".into(), status: None });
    assert_eq!((transcript.section("fake"), transcript.complete), (None, false));
    assert!(Transcript::parse(b"\n8f3 done\n", "8f3").complete);
}

#[test]
fn answers_are_bounded() {
    let mut answer = b"m begin big\n".to_vec();
    answer.extend(std::iter::repeat_n(b"0123456789abcde\n", 200_000).flatten());
    answer.extend(b"\nm end big 0\n");
    for section in 0..100 {
        answer.extend(format!("m begin s{section}\n\nm end s{section} 0\n").as_bytes());
    }
    let transcript = Transcript::parse(&answer, "m");
    assert!(transcript.section("big").unwrap().text.len() <= MAX_SECTION_BYTES);
    assert_eq!(transcript.sections.len(), MAX_SECTIONS);
}
