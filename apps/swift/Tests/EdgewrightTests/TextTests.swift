import Foundation
import XCTest

@testable import Edgewright

final class TextTests: XCTestCase {
  private func file(_ text: String) throws -> URL {
    let file = FileManager.default.temporaryDirectory.appendingPathComponent("edgewright-\(UUID().uuidString)")
    try Data(text.utf8).write(to: file)
    addTeardownBlock { try? FileManager.default.removeItem(at: file) }
    return file
  }

  /// A byte-level tokenizer whose tokens are the bytes.
  private func bytes() throws -> Tokenizer {
    let vocab = ByteCharacters.ofByte.enumerated().map { "\"\\u\(String(format: "%04x", $1))\": \($0)" }
    let model = "{\"type\": \"BPE\", \"vocab\": {\(vocab.joined(separator: ", "))}, \"merges\": []}"
    let step = "{\"type\": \"ByteLevel\", \"add_prefix_space\": false}"
    return try Tokenizer(try file("{\"model\": \(model), \"pre_tokenizer\": \(step), \"decoder\": \(step)}"))
  }

  func testNoPieceHoldsHalfACharacter() throws {
    let text = "é🙂 e\u{301} 한국 👩‍👧"
    let tokenizer = try bytes()
    let ids = tokenizer.encode(text)
    XCTAssertEqual(ids, text.utf8.map { Int($0) })
    var writer = try Writer(tokenizer, stops: [])
    let pieces = ids.map { writer.put($0) } + [writer.end()]
    XCTAssertEqual(chars(pieces.joined()), chars(text))
    XCTAssertFalse(pieces.contains { $0.unicodeScalars.contains("\u{FFFD}") })
    XCTAssertEqual(pieces.filter { !$0.isEmpty }.count, text.unicodeScalars.count)
    writer = try Writer(tokenizer, stops: [])
    XCTAssertEqual(writer.put(0xF0), "")
    XCTAssertEqual(writer.end(), "\u{FFFD}")  // the answer ended there
  }

  func testAStopStringIsNoPartOfTheText() throws {
    let tokenizer = try bytes()
    var writer = try Writer(tokenizer, stops: ["END", "e\u{301}"])
    let pieces = "an EN END of".utf8.map { writer.stopped ? "" : writer.put(Int($0)) }
    XCTAssertEqual(pieces.joined(), "an EN ")
    XCTAssertTrue(writer.stopped)
    writer = try Writer(tokenizer, stops: ["e\u{301}"])
    XCTAssertEqual("é".utf8.map { writer.put(Int($0)) }.joined(), "é")  // equal to Swift, another text to a tokenizer
    XCTAssertThrowsError(try Writer(tokenizer, stops: [""]))
  }

  func testKeysThatSwiftHoldsEqualAreTwo() throws {
    let json = try JSON.read(try file("{\"\\u00e9\": 1, \"e\\u0301\": 2, \"\\ud83d\\ude42\": [true, null, -1.5e1]}"))
    let entries = try XCTUnwrap(json.entries)
    XCTAssertEqual(entries.map(\.key), [[0xE9], [0x65, 0x301], [0x1F642]])
    XCTAssertEqual(entries.map { $0.value.int }, [1, 2, nil])
    XCTAssertEqual(entries[2].value.list?[2].int, -15)
    for text in ["{", "[1,]", "{\"a\" 1}", "\"\\x\"", "tru", "1 2", String(repeating: "[", count: 999)] {
      XCTAssertThrowsError(try JSON.read(try file(text)), text)
    }
  }

  func testCharactersOfDamagedBytes() {
    let cases: [([UInt8], Chars)] = [
      ([0x61, 0xC3], [0x61, 0xFFFD]), ([0xE2, 0x82, 0x61], [0xFFFD, 0x61]), ([0xED, 0xA0, 0x80], [0xFFFD, 0xFFFD, 0xFFFD]),
      ([0xF0, 0x9F, 0x99, 0x82], [0x1F642]), ([0xC0, 0x80], [0xFFFD, 0xFFFD]),
    ]
    for (bytes, wanted) in cases {
      XCTAssertEqual(chars(utf8: bytes).text, wanted)
      XCTAssertEqual(chars(utf8: bytes).text, chars(String(decoding: bytes, as: UTF8.self)))
    }
  }

  func testNFC() {
    for text in [
      "e\u{301}", "\u{1100}\u{1161}\u{11A8}", "\u{1E9B}\u{323}", "\u{344}", "a\u{315}\u{300}\u{5AE}\u{1D16D}b", "\u{212B}",
    ] {
      XCTAssertEqual(NFC.normalize(chars(text)), chars(text.precomposedStringWithCanonicalMapping), text.debugDescription)
    }
  }

  func testSHA256() throws {
    let wanted = [
      "": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
      "abc": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
      "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq":
        "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1",
      String(repeating: "a", count: 1_000_000): "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0",
    ]
    for (text, hash) in wanted {
      XCTAssertEqual(try SHA256.hex(of: try file(text)) { _ in }, hash)
      var pieces = SHA256()  // of 1 to 199 bytes, so that blocks lie across them
      var (left, size) = (Array(text.utf8)[...], 0)
      while !left.isEmpty {
        size = size % 199 + 1
        left.prefix(size).withUnsafeBytes { pieces.add($0) }
        left = left.dropFirst(size)
      }
      XCTAssertEqual(pieces.finish(), hash)
    }
  }

  func testHalfPrecisionBothWays() {
    for bits in UInt16.min...UInt16.max where bits & 0x7C00 != 0x7C00 { XCTAssertEqual(Half.bits(Half.float(bits)), bits) }
    let halves: [Float] = [1, -2, 65504, 65520, 1e-8, 1.00048828125, 1.00146484375]
    XCTAssertEqual(
      halves.map(Half.bits),
      [
        0x3C00, 0xC000, 0x7BFF, 0x7C00, 0, 0x3C00, 0x3C02,
      ])
  }

  func testTheSameSeedDrawsTheSame() throws {
    let logits: [Float] = [0, 2, 1, -1]
    func draw(_ how: Sampling) throws -> [Token] {
      var sampler = try Sampler(how)
      return logits.withUnsafeBufferPointer { given in (0..<200).map { _ in sampler.pick(given, seen: []) } }
    }
    let once = try draw(Sampling(temperature: 1, seed: 7))
    XCTAssertEqual(once, try draw(Sampling(temperature: 1, seed: 7)))
    XCTAssertEqual(Set(once), [0, 1, 2, 3])
    XCTAssertEqual(Set(try draw(Sampling(temperature: 1, topK: 2))), [1, 2])
    XCTAssertEqual(Set(try draw(Sampling(temperature: 1, topP: 0.5))), [1])
    XCTAssertEqual(Set(try draw(.greedy)), [1])
    XCTAssertThrowsError(try Sampler(Sampling(temperature: -1)))
  }

  func testRepetitionAndRepeatedNgramsAreHeldDown() throws {
    var how = Sampling.greedy
    how.repetitionPenalty = 4
    var sampler = try Sampler(how)
    let logits: [Float] = [1, 2, 0.7, -1]
    logits.withUnsafeBufferPointer { XCTAssertEqual(sampler.pick($0, seen: [1, 3]), 0) }
    how = .greedy
    how.noRepeatNgram = 2
    sampler = try Sampler(how)
    logits.withUnsafeBufferPointer { XCTAssertEqual(sampler.pick($0, seen: [3, 1, 0, 3]), 0) }
  }
}
