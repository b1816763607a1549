import Foundation

/// Whatever goes wrong: one line that names the value and the way out.
public struct EdgewrightError: Error, Equatable, Sendable, CustomStringConvertible, LocalizedError {
  public let line: String

  public init(_ line: String) {
    self.line = line
  }

  public var description: String { line }
  public var errorDescription: String? { line }
}
