import Foundation

/// tokenizer.json: text to tokens and back. What is not known here is refused when the file is opened.
final class Tokenizer: Sendable {
  private struct Added {
    var content: Chars
    let id: Token
    let singleWord: Bool
    let lstrip: Bool
    let rstrip: Bool
  }

  /// A part of a text. first: at its very start. id: of an added token, which no step touches.
  private struct Piece {
    var text: Chars
    var first = false
    var id: Token?
  }

  private let vocabulary: Vocabulary
  private let spelling: [Token: Chars]
  private let special: Set<Token>
  private let raw: [Added]
  private let normalized: [Added]
  private let normalizers: [Normalizer]
  private let splitters: [Splitter]
  private let decoders: [DecoderStep]

  init(_ file: URL) throws {
    let whole = try JSON.read(file)
    guard let model = whole["model"] else { throw unknown("no model") }
    vocabulary = try Vocabulary(model)
    normalizers = try Tokenizer.steps(whole["normalizer"], "normalizers").map(Normalizer.init)
    splitters = try Tokenizer.steps(whole["pre_tokenizer"], "pretokenizers").map(Splitter.init)
    decoders = try Tokenizer.steps(whole["decoder"], "decoders").map(DecoderStep.init)
    var (spelling, special) = (vocabulary.spelling, Set<Token>())
    var (raw, normalized): ([Added], [Added]) = ([], [])
    for token in whole["added_tokens"]?.list ?? [] {
      guard let content = token["content"]?.chars, let id = token["id"]?.int else { throw unknown("a token without an id") }
      var added = Added(
        content: content, id: id, singleWord: token["single_word"]?.flag ?? false, lstrip: token["lstrip"]?.flag ?? false,
        rstrip: token["rstrip"]?.flag ?? false)
      if token["special"]?.flag ?? false { special.insert(id) }
      if token["normalized"]?.flag ?? true {
        added.content = normalizers.reduce(content) { $1.apply($0) }
        normalized.append(added)
      } else {
        raw.append(added)
      }
      spelling[id] = added.content  // as the library spells it
    }
    (self.spelling, self.special, self.raw, self.normalized) = (spelling, special, raw, normalized)
  }

  /// The tokens of a text, without those that stand around a prompt.
  func encode(_ text: String) -> [Token] {
    var ids: [Token] = []
    for var piece in Tokenizer.extract(Piece(text: chars(text), first: true), raw) {
      if piece.id == nil { piece.text = normalizers.reduce(piece.text) { $1.apply($0) } }
      for inner in piece.id == nil ? Tokenizer.extract(piece, normalized) : [piece] {
        if let id = inner.id {
          ids.append(id)
        } else {
          for word in split(inner) { vocabulary.add(word, to: &ids) }
        }
      }
    }
    return ids
  }

  func decode(_ ids: some Sequence<Token>) -> String {
    string(decodeChars(ids))
  }

  func decodeChars(_ ids: some Sequence<Token>) -> Chars {
    let parts = ids.compactMap { special.contains($0) ? nil : spelling[$0] }
    if decoders.isEmpty { return Chars(parts.joined(separator: [0x20])) }
    return Chars(decoders.reduce(parts) { $1.apply($0) }.joined())
  }

  /// A sequence taken apart, also one in another.
  private static func steps(_ step: JSON?, _ inner: String) throws -> [JSON] {
    guard let step else { return [] }
    guard step["type"]?.text == "Sequence" else { return [step] }
    guard let parts = step[inner]?.list else { throw unknown("a Sequence without \(inner)") }
    return try parts.flatMap { try steps($0, inner) }
  }

  private func split(_ piece: Piece) -> [Chars] {
    var parts = [piece.text]
    for splitter in splitters {
      parts = parts.enumerated().flatMap { splitter.split($1, first: piece.first && $0 == 0) }
    }
    return parts
  }

  /// The text cut at added tokens, leftmost first, the longest of those that begin there.
  private static func extract(_ whole: Piece, _ tokens: [Added]) -> [Piece] {
    let text = whole.text
    let beginnings = Set(tokens.compactMap(\.content.first))
    var (pieces, from, at): ([Piece], Int, Int) = ([], 0, 0)
    while at < text.count {
      guard beginnings.contains(text[at]), let best = longest(of: tokens, in: text, at) else {
        at += 1
        continue
      }
      var (begin, end) = (at, at + best.content.count)
      at = end
      if best.singleWord {
        let joined = (begin > 0 && Category.word.holds(text[begin - 1])) || (end < text.count && Category.word.holds(text[end]))
        if joined { continue }
      }
      if best.lstrip {
        while begin > from, isSpace(text[begin - 1]) { begin -= 1 }
      }
      if best.rstrip {
        while end < text.count, isSpace(text[end]) { end += 1 }
      }
      if begin > from { pieces.append(Piece(text: Array(text[from..<begin]), first: whole.first && from == 0)) }
      pieces.append(Piece(text: [], id: best.id))
      from = end
      at = end
    }
    if from < text.count { pieces.append(Piece(text: Array(text[from...]), first: whole.first && from == 0)) }
    return pieces
  }

  private static func longest(of tokens: [Added], in text: Chars, _ at: Int) -> Added? {
    var best: Added?
    for token in tokens where !token.content.isEmpty && token.content.count > best?.content.count ?? 0 {
      if text[at...].starts(with: token.content) { best = token }
    }
    return best
  }
}
